"""The documentation site: its pages, its links, and what nbdev does to the notebooks before Quarto sees them."""
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
NBS = ROOT / 'nbs'
NOTEBOOKS = sorted(p for p in NBS.rglob('*.ipynb') if not any(part[0] in '._' for part in p.relative_to(NBS).parts))
LINK = re.compile(r'\]\(([^)\s]+)\)')
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


@pytest.mark.parametrize('path', [*NOTEBOOKS, *sorted(ROOT.glob('*.md'))], ids=lambda p: p.relative_to(ROOT).as_posix())
def test_relative_links_lead_somewhere(path):
    targets = [t for t in LINK.findall(prose(path)) if not re.match(r'[a-z]+:|#', t)]
    missing = [t for t in targets if not (path.parent / t.split('#')[0]).exists()]
    assert not missing, f'{path.relative_to(ROOT)} links to what is not there: {missing}'


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
