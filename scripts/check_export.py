"""Are the notebooks clean, and is datatools/ exactly what they export? With --write, put datatools/ in step."""
import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
GENERATED = 'nbs/nbdev.yml'  # written by nbdev beside the notebooks


def tree(folder: Path, pattern: str) -> dict[str, bytes]:
    "The files under `folder` that match `pattern`, as {relative path: content}."
    files = [p for p in folder.rglob(pattern) if p.is_file() and not {'__pycache__', '.ipynb_checkpoints'} & set(p.parts)]
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in files}


def differences(have: dict[str, bytes], want: dict[str, bytes]) -> list[str]:
    "One line for each file that is missing, stale or different in `have`."
    word = {(True, True): 'differs', (False, True): 'missing', (True, False): 'stale'}
    return [f'{word[name in have, name in want]}: {name}'
            for name in sorted(have.keys() | want.keys()) if have.get(name) != want.get(name)]


def fresh_copy(into: Path) -> Path:
    "Copy settings and notebooks into `into`, clean them and export the package there from nothing."
    shutil.copy(ROOT / 'settings.ini', into)
    shutil.copytree(ROOT / 'nbs', into / 'nbs', ignore=shutil.ignore_patterns('.*'))
    environment = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}  # nbdev exports nothing under IN_TEST
    refresh = [sys.executable, '-c', 'from nbdev.quarto import refresh_quarto_yml; refresh_quarto_yml()']
    for command in ([BIN / 'nbdev_clean'], [BIN / 'nbdev_export'], refresh):
        done = subprocess.run(command, cwd=into, env=environment, text=True, capture_output=True)
        sys.stderr.write(done.stderr)
        if done.returncode: raise SystemExit(f'{Path(command[0]).name} failed on the notebooks')
    return into


def put_in_step(copy: Path) -> None:
    "Replace the package and nbdev's settings for the site by those of `copy`."
    want = tree(copy / 'datatools', '*.py')
    for name in tree(ROOT / 'datatools', '*.py').keys() - want.keys(): (ROOT / 'datatools' / name).unlink()
    for name, content in want.items():
        target = ROOT / 'datatools' / name
        if target.exists() and target.read_bytes() == content: continue
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(content)
    shutil.copy(copy / GENERATED, ROOT / GENERATED)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument('--write', action='store_true', help='put datatools/ in step instead of failing')
    write = parser.parse_args().write
    with tempfile.TemporaryDirectory() as folder:
        copy = fresh_copy(Path(folder))
        if write: put_in_step(copy)
        unclean = differences(tree(ROOT / 'nbs', '*.ipynb'), tree(copy / 'nbs', '*.ipynb'))
        stale = differences(tree(ROOT / 'datatools', '*.py'), tree(copy / 'datatools', '*.py'))
        if (ROOT / GENERATED).read_bytes() != (copy / GENERATED).read_bytes(): stale.append(f'differs: {GENERATED}')
    if unclean: print('notebooks that nbdev_clean changes (run make prepare):', *unclean, sep='\n  ')
    if stale: print('datatools/ is not what the notebooks export (run make prepare):', *stale, sep='\n  ')
    dirty = ''
    if os.environ.get('CI') == 'true':  # in CI the checkout must also be exactly the commit
        dirty = subprocess.run(['git', 'status', '--porcelain'], cwd=ROOT, text=True, capture_output=True, check=True).stdout
        if dirty: print('the checkout is not the commit (git status --porcelain):', dirty, sep='\n')
    return 1 if unclean or stale or dirty else 0


if __name__ == '__main__': sys.exit(main())
