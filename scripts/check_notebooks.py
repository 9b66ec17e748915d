"""The house style of the notebooks, checked. Exit code 1 with one line per finding: notebook:cell, what, remedy.

--report also lists very long cells, functions and notebooks; these do not fail the check.
"""
import argparse
import ast
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / 'nbs'
CELL_LINES, NOTEBOOK_CELLS, FUNCTION_LINES = 40, 60, 25
DIRECTIVE = re.compile(r'^\s*#\s*\|\s*([\w-]+):?[ \t]*(.*)$', re.M)
EXPORTS = {'export', 'exporti', 'exports'}
MACHINE_PATH = re.compile(r'(?<![\w.:/~-])/(?:home|Users|root|work|tmp|mnt|opt|var/folders)/[\w.-]+|\b[A-Z]:\\+Users\\')
BASE64 = re.compile(r'base64,[A-Za-z0-9+/=\s]+')
Finding = tuple[int, str]


@dataclass
class Cell:
    "One cell: its number in the notebook, what is written in it and what it printed."
    number: int
    kind: str
    source: str
    outputs: list

    @cached_property
    def directives(self) -> dict[str, str]:
        return dict(DIRECTIVE.findall(self.source)) if self.kind == 'code' else {}

    @cached_property
    def body(self) -> list[ast.stmt]:
        "The statements of a code cell; none for prose and for cells in IPython's own syntax."
        if self.kind != 'code': return []
        try: return ast.parse(self.source).body
        except SyntaxError: return []

    @property
    def exported(self) -> bool: return bool(EXPORTS & self.directives.keys())

    @property
    def evaluated(self) -> bool: return self.directives.get('eval', '').strip().lower() != 'false'

    @property
    def tests(self) -> bool:
        "Does the cell hold a test: an assertion, a test_... call or an expected error?"
        nodes = [node for statement in self.body for node in ast.walk(statement)]
        names = [getattr(n.func, 'id', getattr(n.func, 'attr', '')) for n in nodes if isinstance(n, ast.Call)]
        names += [n.id for n in nodes if isinstance(n, ast.Name) and n.id == 'ExceptionExpected']
        return any(isinstance(n, ast.Assert) for n in nodes) or any(
            name.startswith('test_') or name == 'ExceptionExpected' for name in names)


def read(path: Path) -> list[Cell]:
    "The cells of a notebook."
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    return [Cell(i, c['cell_type'], ''.join(c['source']), c.get('outputs', [])) for i, c in enumerate(cells)]


def notebooks() -> list[Path]:
    "Every notebook of the project, in order."
    return sorted(p for p in NBS.rglob('*.ipynb') if not any(part[0] in '._' for part in p.relative_to(NBS).parts))


def title(cells: list[Cell]) -> Iterator[Finding]:
    first = cells[0].source if cells and cells[0].kind == 'markdown' else ''
    if not re.match(r'# \S.*\n+> \S', first):
        yield 0, 'the first cell is not a title: open it with "# Title", an empty line and "> subtitle"'


def front_matter(cells: list[Cell]) -> Iterator[Finding]:
    for cell in cells:
        if cell.kind == 'raw' or cell.number == 0 and cell.source.startswith('---'):
            yield cell.number, 'raw cell or front matter: say it with "# Title" and "> subtitle"'


def mixed_imports(cells: list[Cell]) -> Iterator[Finding]:
    for cell in cells:
        imports = [isinstance(statement, (ast.Import, ast.ImportFrom)) for statement in cell.body]
        if cell.evaluated and any(imports) and not all(imports) and 'nbdev_export(' not in cell.source:
            yield cell.number, 'imports mixed with other code: move them to a cell of their own'


def hidden_tests(cells: list[Cell]) -> Iterator[Finding]:
    for cell in cells:
        if not cell.tests: continue
        d = cell.directives
        if 'hide' in d or d.get('include', '').strip() == 'false' or d.get('echo', '').strip() == 'false':
            yield cell.number, 'a hidden test: show it, or hide only the set-up'
        if not cell.evaluated: yield cell.number, 'a test under "eval: false" never runs: remove the directive'


def machine_paths(cells: list[Cell]) -> Iterator[Finding]:
    for cell in cells:
        texts = {'source': cell.source, 'output': '\n'.join(map(shown, cell.outputs))}
        for where, text in texts.items():
            if found := MACHINE_PATH.search(BASE64.sub('', text)):
                yield cell.number, f'a path of one machine in its {where}, {found[0]!r}: use or print a relative path'


def shown(output: dict) -> str:
    "All text in one output, pictures left out."
    data = {k: v for k, v in output.get('data', {}).items() if k.startswith('text/')}
    parts = [output.get('text', ''), *data.values()]
    return '\n'.join(part if isinstance(part, str) else ''.join(part) for part in parts)


def saved_errors(cells: list[Cell]) -> Iterator[Finding]:
    for cell in cells:
        if any(output['output_type'] == 'error' for output in cell.outputs):
            yield cell.number, 'an error in the saved output: run the notebook again (make notebooks)'


RULES = [title, front_matter, mixed_imports, hidden_tests, machine_paths, saved_errors]


def pages(part: str) -> list[str]:
    "The notebooks that the site's sidebar or navbar lists, as paths below nbs/."
    def walk(node: object) -> Iterator[str]:
        if isinstance(node, str): yield node
        elif isinstance(node, list): yield from (page for item in node for page in walk(item))
        elif isinstance(node, dict): yield from walk([node.get(k) for k in ('href', 'contents', 'left', 'right', 'menu')])
    site = yaml.safe_load((ROOT / '_quarto.yml').read_text(encoding='utf-8'))
    return [page for page in walk(site['website'][part]) if page.endswith('.ipynb')]


def out_of_sidebar() -> Iterator[str]:
    "Findings where the sidebar and the notebooks disagree."
    have, listed, linked = {p.relative_to(NBS).as_posix() for p in notebooks()}, pages('sidebar'), pages('navbar')
    for page in sorted(have - set(listed)): yield f'nbs/{page}: not in the sidebar: add it to _quarto.yml'
    for page in sorted({*listed, *linked} - have): yield f'_quarto.yml: it lists {page}, which is not in nbs/: remove it'
    for page in sorted({p for p in listed if listed.count(p) > 1}): yield f'_quarto.yml: the sidebar lists {page} twice'


def length_report(cells: list[Cell]) -> Iterator[Finding]:
    if len(cells) > NOTEBOOK_CELLS: yield 0, f'{len(cells)} cells (more than {NOTEBOOK_CELLS}): split the notebook'
    for cell in (c for c in cells if c.exported):
        lines = len(cell.source.splitlines())
        if lines > CELL_LINES: yield cell.number, f'{lines} lines in an exported cell (more than {CELL_LINES}): spread it'
        for node in (n for statement in cell.body for n in ast.walk(statement)):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)): continue
            lines = node.end_lineno - node.body[0].lineno + 1
            if lines > FUNCTION_LINES: yield cell.number, f'{node.name} has {lines} lines (more than {FUNCTION_LINES})'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--report', action='store_true', help='also list long cells, functions and notebooks')
    options, findings, report = parser.parse_args(), list(out_of_sidebar()), []
    for path in notebooks():
        cells, name = read(path), path.relative_to(ROOT).as_posix()
        findings += [f'{name}:{number}: {text}' for rule in RULES for number, text in rule(cells)]
        if options.report: report += [f'{name}:{number}: {text}' for number, text in length_report(cells)]
    if report: print('long, worth a look (not enforced):', *report, sep='\n  ')
    if findings: print('the house style wants these changed:', *findings, sep='\n  ')
    return 1 if findings else 0


if __name__ == '__main__': sys.exit(main())
