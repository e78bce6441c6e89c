"""Run notebooks in place and keep their outputs, skipping exactly the cells that `nbdev_test` skips.

    python tests/execute_notebooks.py nbs/00_rope.ipynb ...        # a word prefixed by + also runs cells with that flag (+slow)
"""
import os, sys, time
from pathlib import Path

os.environ.update(SOURCE_DATE_EPOCH='0', HF_HUB_OFFLINE='1', HF_HUB_DISABLE_PROGRESS_BARS='1', TOKENIZERS_PARALLELISM='false', MPLBACKEND='module://matplotlib_inline.backend_inline')  # same bytes on every run

from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from fastcore.utils import working_directory
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.process import NBProcessor


def run(path, force=()):
    path, cfg = Path(path).absolute(), get_config()
    flags = set(cfg.tst_flags.split()) - set(force)
    directives = {c.id: (getattr(c, 'directives_', {}) or {}) for c in NBProcessor(path, process=True).nb.cells}
    def skip(cell):
        if cell.cell_type != 'code' or 'nbdev_export(' in cell.source: return True
        d = directives.get(cell.id, {})
        return d.get('eval:', [''])[0].lower() == 'false' or bool(flags & d.keys())
    nb, start = read_nb(path), time.time()
    shell = CaptureShell(path, mpl_format='svg')
    with working_directory(path.parent): shell.run_all(nb, exc_stop=True, preproc=skip)
    clean_nb(nb); write_nb(nb, path)
    print(f'{path.name}: {time.time() - start:.1f} s')


if __name__ == '__main__':
    force = [a[1:] for a in sys.argv[1:] if a.startswith('+')]
    for name in [a for a in sys.argv[1:] if not a.startswith('+')]: run(name, force)
