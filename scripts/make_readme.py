"""Write README.md and its pictures from nbs/index.ipynb, without Quarto. With --check, only say whether they are in step.

A picture that a cell has saved goes to nbs/images/NAME.png, where `#| label: NAME` gives the name and `#| fig-alt:` the
words for those who do not see it. That folder holds nothing else: what the notebook no longer draws is removed.
"""
import argparse
import ast
import base64
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIRECTIVE = re.compile(r'^\s*#\s*\|\s*([\w-]+):?[ \t]*(.*)\n?', re.M)


def as_text(value: str | list[str]) -> str:
    "A notebook stores text as one string or as a list of lines."
    return value if isinstance(value, str) else ''.join(value)


def output_text(output: dict, directives: dict) -> str:
    "A cell's output as markdown."
    if output['output_type'] == 'stream': return fenced(as_text(output['text']), '')
    data = output.get('data', {})
    if 'text/markdown' in data: return as_text(data['text/markdown']).strip()
    if 'image/png' in data: return f"![{directives['fig-alt']}](nbs/images/{directives['label']}.png)"
    if 'text/plain' in data and 'text/html' not in data: return fenced(as_text(data['text/plain']), '')
    return ''


def fenced(text: str, language: str) -> str:
    "`text` as a fenced block, nothing for empty text."
    return f'```{language}\n{text.strip()}\n```' if text.strip() else ''


def markdown_cell(source: str) -> str:
    "Prose as it is; the notebook's subtitle becomes plain prose and links lead into nbs/."
    source = re.sub(r'\A(# .+\n+)> ?(.+)', r'\1\2', source)
    return re.sub(r'\]\((?!https?:|#|mailto:|\.\./)([^)\s]+\.ipynb)', r'](nbs/\1', source).replace('](../', '](').strip()


def only_imports(code: str) -> bool:
    "Are these imports and nothing else? They stand in cells of their own, and belong to what follows."
    return not code.startswith('%%') and all(isinstance(each, (ast.Import, ast.ImportFrom)) for each in ast.parse(code).body)


def code_cell(cell: dict, imports: str) -> str:
    "Imports, code and outputs, without directives; nothing for a hidden cell."
    source, directives = as_text(cell['source']), directives_of(cell)
    code = '' if directives.get('echo', '').strip() == 'false' else DIRECTIVE.sub('', source)
    block = fenced(code.removeprefix('%%bash'), 'sh') if code.startswith('%%bash') else fenced('\n\n'.join(filter(None, [imports, code])), 'python')
    return '\n\n'.join(filter(None, [block, *(output_text(output, directives) for output in cell.get('outputs', []))]))


def directives_of(cell: dict) -> dict[str, str]: return {name: value.strip() for name, value in DIRECTIVE.findall(as_text(cell['source']))}


def shown(cell: dict) -> bool:
    "Does a reader of the site see anything of this cell?"
    directives = directives_of(cell) if cell['cell_type'] == 'code' else {}
    return 'hide' not in directives and directives.get('include') != 'false' and 'nbdev_export(' not in as_text(cell['source'])


def cells() -> list[dict]:
    "The cells of nbs/index.ipynb that are shown."
    return list(filter(shown, json.loads((ROOT / 'nbs/index.ipynb').read_text(encoding='utf-8'))['cells']))


def readme() -> str:
    "README.md as nbs/index.ipynb wants it."
    parts, imports = ['<!-- Written from nbs/index.ipynb by scripts/make_readme.py: edit the notebook, then run make prepare. -->'], ''
    for cell in cells():
        source = as_text(cell['source'])
        if cell['cell_type'] == 'markdown': parts.append(markdown_cell(source))
        elif only_imports(source): imports = source.strip()
        else: parts, imports = [*parts, code_cell(cell, imports)], ''
    return '\n\n'.join(filter(None, parts)) + '\n'


def pictures() -> dict[Path, bytes]:
    "The pictures of the README, by their paths."
    found = {}
    for cell in cells():
        for data in (output.get('data', {}) for output in cell.get('outputs', [])):
            if 'image/png' in data: found[ROOT / f"nbs/images/{directives_of(cell)['label']}.png"] = base64.b64decode(as_text(data['image/png']))
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--check', action='store_true', help='exit 1 if something is out of step, write nothing')
    wanted = {ROOT / 'README.md': readme().encode(), **pictures()}
    old = [path for path in wanted if not path.exists() or path.read_bytes() != wanted[path]]
    stale = sorted({*(ROOT / 'nbs/images').glob('*.png')} - {*wanted})
    if parser.parse_args().check:
        for path in [*old, *stale]: print(f'{path.relative_to(ROOT)} is out of step with nbs/index.ipynb: run make prepare')
        return int(bool(old or stale))
    for path in old:
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(wanted[path])
    for path in stale: path.unlink()
    return 0


if __name__ == '__main__': sys.exit(main())
