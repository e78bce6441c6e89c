"""Fail if the modules are not what the notebooks export, or if a notebook is not clean."""
import shutil, subprocess, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
KEEP = ('nbs', 'pose_nb', 'settings.ini', 'setup.py', 'pyproject.toml', 'README.md')


def contents(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for d in ('nbs', 'pose_nb') for p in sorted((folder/d).rglob('*'))
            if p.suffix in ('.py', '.ipynb') and '__pycache__' not in p.parts and '.ipynb_checkpoints' not in p.parts}


def main():
    bin_ = Path(sys.executable).parent
    with tempfile.TemporaryDirectory() as tmp:
        copy = Path(tmp)/'repo'
        copy.mkdir()
        for name in KEEP:
            src = ROOT/name
            if src.is_dir(): shutil.copytree(src, copy/name, symlinks=True, ignore=shutil.ignore_patterns('__pycache__', 'assets'))
            elif src.exists(): shutil.copy(src, copy/name)
        before = contents(copy)
        for command in ('nbdev_export', 'nbdev_clean'): subprocess.run([bin_/command], cwd=copy, check=True)
        after = contents(copy)
    changed = sorted(k for k in before.keys() | after.keys() if before.get(k) != after.get(k))
    if changed: sys.exit('not exported or not clean (run nbdev_export and nbdev_clean): ' + ', '.join(changed))
    print(f'{len(after)} files: modules are in sync with their notebooks, notebooks are clean')


if __name__ == '__main__': main()
