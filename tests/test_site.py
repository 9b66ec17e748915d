"""The documentation site: its pages, its links, and what nbdev does to the notebooks before Quarto sees them."""
import ast
import json
import os
import re
import shutil
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / 'nbs'
NOTEBOOKS = sorted(p for p in NBS.rglob('*.ipynb') if not any(part[0] in '._' for part in p.relative_to(NBS).parts))
LINK = re.compile(r'\]\(([^)\s]+)\)')
FENCED = re.compile(r'^(```|~~~).*?^\1', re.M | re.S)
sys.path.insert(0, str(ROOT / 'scripts'))
import check_notebooks as style  # noqa: E402

PREPARE = '''
import sys
from nbdev.serve import proc_nbs
if __name__ == '__main__': proc_nbs(n_workers=2, force=True)
'''


def prose(path: Path) -> str:
    "The markdown of a notebook or a markdown file."
    text = path.read_text(encoding='utf-8')
    if path.suffix != '.ipynb': return text
    return '\n'.join(''.join(c['source']) for c in json.loads(text)['cells'] if c['cell_type'] == 'markdown')


def test_configuration_is_the_one_meant():
    site = yaml.safe_load((ROOT / '_quarto.yml').read_text(encoding='utf-8'))
    assert site['project'] == {'type': 'website', 'output-dir': '_docs'}
    assert list(site['format']) == ['html'], 'commonmark output crashes the build'
    assert site['format']['html']['html-math-method'] == 'mathml'
    included = yaml.safe_load((NBS / '_quarto.yml').read_text(encoding='utf-8'))
    assert included == {'metadata-files': ['../_quarto.yml', 'nbdev.yml']}
    assert (NBS / site['format']['html']['css']).exists()


def slug(heading: str) -> str:
    "The identifier that Pandoc, and so Quarto, gives a heading: https://pandoc.org/MANUAL.html#extension-auto_identifiers"
    text = re.sub(r'\[([^]]*)\]\([^)]*\)', r'\1', heading)  # of a link its text
    text = re.sub(r'\s+', '-', re.sub(r'[^\w\s.-]', '', text.lower()).strip())
    return re.sub(r'^[\W\d_]+', '', text) or 'section'


@cache
def anchors(path: Path) -> set:
    "What `#...` can lead to within a page; the title of a page is no such place."
    headings = re.findall(r'^##+ +(.+?)(?: +\{.*\})?$', FENCED.sub('', prose(path)), re.M)
    seen, found = Counter(), set()
    for name in map(slug, headings):
        found.add(f'{name}-{seen[name]}' if seen[name] else name)
        seen[name] += 1
    if path.suffix == '.ipynb':  # nbdev gives every public function and class that is exported a heading of its own
        defined = [node for cell in style.read(path) if cell.exported for node in cell.body]
        found |= {node.name.lower() for node in defined if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_')}
    return found


@pytest.mark.parametrize('heading, identifier', [
    ('Files that appear whole or not at all', 'files-that-appear-whole-or-not-at-all'), ("Maître d'hôtel", 'maître-dhôtel'),
    ('*Dogs*?--in *my* house?', 'dogs--in-my-house'), ('3. Applications', 'applications'), ('`fork`, `state` and `none`', 'fork-state-and-none'),
    ('See [the job](x.ipynb)', 'see-the-job'),
])
def test_identifiers_are_those_of_pandoc(heading, identifier): assert slug(heading) == identifier


PAGES = [*NOTEBOOKS, *sorted(ROOT.glob('*.md'))]


@pytest.mark.parametrize('path', PAGES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_and_anchors_lead_somewhere(path):
    targets = [t for t in LINK.findall(FENCED.sub('', prose(path))) if not re.match(r'[a-z]+:', t)]
    for target in targets:
        place, _, anchor = target.partition('#')
        page = (path.parent / place).resolve() if place else path
        assert page.exists(), f'{path.relative_to(ROOT)} links to {target}, which is not there'
        if anchor: assert anchor in anchors(page), f'{path.relative_to(ROOT)} links to {target}; the sections there are {sorted(anchors(page))}'


def test_every_page_is_in_the_sidebar_once_and_opens_from_the_navbar():
    assert list(style.out_of_sidebar()) == []
    overviews = {f'{wing}/00_overview.ipynb' for wing in ('groove', 'stft', 'vst', 'pool')}
    assert overviews | {'index.ipynb'} <= set(style.pages('navbar'))
    sections = [each['section'] for each in yaml.safe_load((ROOT / '_quarto.yml').read_text(encoding='utf-8'))['website']['sidebar']['contents']]
    assert sections[:2] == ['Get started', 'Tutorials'], 'a newcomer reads from the top'


def calls(cell) -> set:
    "Names of what a cell that is shown on the site calls for certain: not under a condition, not in a function that it defines."
    def walk(node):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.If, ast.IfExp, ast.ExceptHandler)): return
        yield node
        for child in ast.iter_child_nodes(node): yield from walk(child)
    if not cell.evaluated or cell.exported or 'hide' in cell.directives or 'nbdev_export(' in cell.source: return set()
    found = [node.func for statement in cell.body for node in walk(statement) if isinstance(node, ast.Call)]
    return {getattr(each, 'id', getattr(each, 'attr', '')) for each in found}


def unsaved(cell) -> list:
    "What a cell shows and its saved outputs do not have."
    called, kinds = calls(cell), {kind for output in cell.outputs for kind in output.get('data', {})}
    missing = []
    if 'print' in called and not any(output['output_type'] == 'stream' for output in cell.outputs): missing.append('what it prints')
    if called & {'subplots', 'figure', 'imshow'} and not any(kind.startswith('image/') for kind in kinds): missing.append('its figure')
    if 'Audio' in called and 'text/html' not in kinds: missing.append('its audio player')
    return missing


@pytest.mark.parametrize('source, missing', [
    ('print(1)', ['what it prints']), ('if x: print(1)', []), ('#| hide\nprint(1)', []), ('def f(): print(1)', []),
    ('fig, ax = plt.subplots()', ['its figure']), ('display(Audio(x, rate=8000))', ['its audio player']),
])
def test_missing_outputs_are_seen(source, missing): assert unsaved(style.Cell(0, 'code', source, [])) == missing


@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.relative_to(NBS).as_posix())
def test_outputs_are_saved(path):
    cells = style.read(path)
    missing = [f'cell {cell.number}: {" and ".join(unsaved(cell))}' for cell in cells if unsaved(cell)]
    assert not missing, f'{path.relative_to(ROOT)}: {missing}. Run `make notebooks NB={path.relative_to(ROOT)}`.'
    assert path.stat().st_size < 2e6, f'{path.relative_to(ROOT)} is large: smaller figures, shorter audio'


def test_nbdev_prepares_every_notebook(tmp_path, python):
    "The step before Quarto runs imports, exports and show_doc of every notebook; a warning there is a broken page."
    shutil.copytree(NBS, tmp_path / 'nbs', ignore=shutil.ignore_patterns('.*'))
    for name in ('settings.ini', '_quarto.yml'): shutil.copy(ROOT / name, tmp_path)
    (tmp_path / 'prepare.py').write_text(PREPARE, encoding='utf-8')
    environment = {k: v for k, v in os.environ.items() if k != 'IN_TEST'}
    done = python('prepare.py', cwd=tmp_path, timeout=600, env=environment)
    assert done.returncode == 0, done.stderr
    assert 'imports and other code' not in done.stderr, done.stderr
    assert 'Error' not in done.stderr, done.stderr
    for path in NOTEBOOKS:
        prepared = tmp_path / '_proc' / path.relative_to(NBS)
        cells = json.loads(prepared.read_text(encoding='utf-8'))['cells']
        assert cells[0]['source'][0].startswith('---\n'), f'{path.name}: its title did not become front matter'
