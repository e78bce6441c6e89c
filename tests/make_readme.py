"""Write README.md (and its figures in README_files/) from nbs/index.ipynb, as `nbdev_readme` does where Quarto is installed.

    python tests/make_readme.py            # write
    python tests/make_readme.py --check    # fail if README.md is not what the notebook gives
"""
import re, sys
from pathlib import Path

import nbformat
from nbconvert import MarkdownExporter

ROOT = Path(__file__).parent.parent


def prepared(path):
    "The notebook without hidden cells and directive lines; links point from the repository root."
    nb = nbformat.read(path, as_version=4)
    nb.metadata['language_info'] = {'name': 'python'}
    nb.cells = [c for c in nb.cells if not (c.cell_type == 'code' and re.search(r'^#\|\s*hide\b', c.source, re.M))]
    for c in nb.cells:
        if c.cell_type == 'code':
            c.source = '\n'.join(l for l in c.source.splitlines() if not l.startswith('#|'))
            c.outputs = [o for o in c.outputs if o.get('name') != 'stderr']
        else: c.source = re.sub(r'\]\((?!https?:|#)([^)]+\.ipynb)\)', r'](nbs/\1)', c.source)
    return nb


def main():
    exporter = MarkdownExporter()
    body, resources = exporter.from_notebook_node(prepared(ROOT/'nbs'/'index.ipynb'))
    body = re.sub(r'<style scoped>.*?</style>\n?', '', body, flags=re.S)
    files = {f'README_files/{n}': data for n, data in resources['outputs'].items()}
    for n in resources['outputs']: body = body.replace(f']({n})', f'](README_files/{n})')
    files['README.md'] = ('<!-- Made from nbs/index.ipynb by tests/make_readme.py; edit the notebook. -->\n\n' + body.strip() + '\n').encode()
    if '--check' in sys.argv:
        stale = [n for n, data in files.items() if not (ROOT/n).exists() or (ROOT/n).read_bytes() != data]
        if stale: sys.exit(f"README is not what nbs/index.ipynb gives (run tests/make_readme.py): {', '.join(stale)}")
        return print('README.md is in sync with nbs/index.ipynb')
    (ROOT/'README_files').mkdir(exist_ok=True)
    for old in (ROOT/'README_files').iterdir(): old.unlink()
    for n, data in files.items(): (ROOT/n).write_bytes(data)
    print(f'wrote {len(files)} files')


if __name__ == '__main__': main()
