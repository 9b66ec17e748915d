"""Write README.md from nbs/index.ipynb, without Quarto. With --check, only say whether it is in step."""
import argparse
import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DIRECTIVE = re.compile(r'^\s*#\s*\|\s*([\w-]+):?[ \t]*(.*)\n?', re.M)


def as_text(value: str | list[str]) -> str:
    "A notebook stores text as one string or as a list of lines."
    return value if isinstance(value, str) else ''.join(value)


def output_text(output: dict) -> str:
    "A cell's output as markdown; pictures are left to the site."
    if output['output_type'] == 'stream': return fenced(as_text(output['text']), '')
    data = output.get('data', {})
    if 'text/markdown' in data: return as_text(data['text/markdown']).strip()
    if 'text/plain' in data and not any(kind.startswith(('image/', 'text/html')) for kind in data):
        return fenced(as_text(data['text/plain']), '')
    return ''


def fenced(text: str, language: str) -> str:
    "`text` as a fenced block, nothing for empty text."
    return f'```{language}\n{text.strip()}\n```' if text.strip() else ''


def markdown_cell(source: str) -> str:
    "Prose as it is; the notebook's subtitle becomes plain prose and links lead into nbs/."
    source = re.sub(r'\A(# .+\n+)> ?(.+)', r'\1\2', source)
    return re.sub(r'\]\((?!https?:|#|mailto:|\.\./)([^)\s]+\.ipynb)', r'](nbs/\1', source).replace('](../', '](').strip()


def code_cell(cell: dict) -> str:
    "Code and outputs, without directives; nothing for a hidden cell."
    source = as_text(cell['source'])
    found = dict(DIRECTIVE.findall(source))
    if 'hide' in found or found.get('include', '').strip() == 'false' or 'nbdev_export' in source: return ''
    code = '' if found.get('echo', '').strip() == 'false' else fenced(DIRECTIVE.sub('', source), 'python')
    return '\n\n'.join(filter(None, [code, *map(output_text, cell.get('outputs', []))]))


def readme() -> str:
    "README.md as nbs/index.ipynb wants it."
    cells = json.loads((ROOT / 'nbs/index.ipynb').read_text(encoding='utf-8'))['cells']
    parts = [markdown_cell(as_text(c['source'])) if c['cell_type'] == 'markdown' else code_cell(c) for c in cells]
    note = '<!-- Written from nbs/index.ipynb by scripts/make_readme.py: edit the notebook, then run make prepare. -->'
    return '\n\n'.join(filter(None, [note, *parts])) + '\n'


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument('--check', action='store_true', help='exit 1 if README.md is out of step, write nothing')
    check = parser.parse_args().check
    path, text = ROOT / 'README.md', readme()
    if not check: path.write_text(text, encoding='utf-8')
    elif not path.exists() or path.read_text(encoding='utf-8') != text:
        print('README.md is out of step with nbs/index.ipynb: run make prepare')
        return 1
    return 0


if __name__ == '__main__': sys.exit(main())
