"""Execute notebooks and save their outputs. Each runs in a process of its own, in its own folder; default: all.

What nbdev_test skips is skipped here too and keeps its old outputs: cells with `#| eval: false`, with a flag
of `tst_flags` (settings.ini), and the closing `nbdev_export()`. A notebook that fails is not written.
"""
import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def directives(source: str) -> dict[str, str]:
    "The `#| name: value` lines of a cell as {name: value}."
    return {name: value.strip() for name, value in re.findall(r'^\s*#\s*\|\s*([\w-]+):?[ \t]*(.*)$', source, re.M)}


def skipped(source: str, flags: set[str]) -> bool:
    "Does nbdev_test leave this cell out?"
    found = directives(source)
    return 'nbdev_export(' in source or found.get('eval', '').lower() == 'false' or bool(flags & found.keys())


def last_state(text: list[str]) -> list[str]:
    "What a terminal would show of `text` at the end: of a progress bar only its last state."
    lines = ''.join(text).replace('\r\n', '\n').split('\n')
    return '\n'.join(line.rstrip('\r').rsplit('\r', 1)[-1] for line in lines).splitlines(keepends=True)


def execute(path: Path, picture_format: str) -> int:
    "Run one notebook in this process and write it back; 1 and the failing cell on stderr when a cell fails."
    from execnb.nbio import read_nb, write_nb
    from execnb.shell import CaptureShell, format_exc
    from nbdev.config import get_config
    flags = set(get_config(path=ROOT).tst_flags.split())
    notebook = read_nb(path)
    os.chdir(path.parent)
    sys.path[:0] = [str(ROOT)]
    shell = CaptureShell(mpl_format=picture_format)
    for number, cell in enumerate(notebook.cells):
        if cell.cell_type != 'code' or skipped(cell.source, flags): continue
        cell.outputs = []
        shell.cell(cell)
        if shell.exc:
            print(f'{path.relative_to(ROOT)} cell {number} failed:', cell.source, '', *format_exc(shell.exc), sep='\n',
                  file=sys.stderr)
            return 1
        for output in cell.outputs:
            if 'text' in output: output['text'] = last_state(output['text'])
    write_nb(notebook, path)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('notebooks', nargs='*', type=Path, help='notebooks to run (default: all)')
    parser.add_argument('--picture-format', default='png', choices=['png', 'retina', 'svg'], help='of matplotlib figures')
    parser.add_argument('--here', action='store_true', help=argparse.SUPPRESS)  # run the one notebook in this process
    options = parser.parse_args()
    every = sorted(p for p in (ROOT / 'nbs').rglob('*.ipynb') if not any(q[0] in '._' for q in p.relative_to(ROOT).parts))
    paths = [p.resolve() for p in options.notebooks] or every
    if options.here: return execute(paths[0], options.picture_format)
    failed = []
    for path in paths:
        print(path.relative_to(ROOT), flush=True)
        command = [sys.executable, __file__, '--here', '--picture-format', options.picture_format, str(path)]
        if subprocess.run(command, cwd=ROOT).returncode: failed.append(path)
        else: subprocess.run([Path(sys.executable).parent / 'nbdev_clean', '--fname', str(path)], cwd=ROOT, check=True)
    if failed: print('failed, not saved:', *(p.relative_to(ROOT) for p in failed), file=sys.stderr)
    return 1 if failed else 0


if __name__ == '__main__': sys.exit(main())
