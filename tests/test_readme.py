"""README.md: what it shows runs as it stands, its pictures are there and small, its figures are the measured ones."""
import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / 'README.md').read_text(encoding='utf-8')
BLOCK = re.compile(r'^```(\w*)\n(.*?)^```$', re.M | re.S)
PICTURE = re.compile(r'!\[(.*?)\]\((.*?)\)')
TOOLS = ['groove', 'stft', 'vst', 'pool']


def test_every_block_runs_in_an_empty_folder(tmp_path):
    "From top to bottom, each in a process of its own."
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])
    environment = dict(os.environ, PATH=path, PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')])))
    commands = dict(python=[sys.executable, '-c'], sh=['sh', '-ec'])
    run = [(language, code) for language, code in BLOCK.findall(README) if language]
    assert [language for language, _ in run] == ['python', 'sh', 'python', 'sh', 'python', 'sh', 'python']
    for language, code in run:
        done = subprocess.run([*commands[language], code], cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=600)  # where nothing is compiled yet, that comes on top
        assert done.returncode == 0, f'{code}\n{done.stdout}\n{done.stderr}'


def test_make_knows_the_commands():
    targets = re.findall(r'^(\w+):.*##', (ROOT / 'Makefile').read_text(encoding='utf-8'), re.M)
    asked = re.findall(r'(?:^|`)make (\w+)', README, re.M)
    assert asked[:2] == ['demo', 'test'] and set(asked) <= {*targets}


def test_one_picture_a_tool_and_each_is_small():
    found = PICTURE.findall(README)
    assert [path for _, path in found] == [f'nbs/images/{tool}.png' for tool in TOOLS]
    for words, path in found:
        picture = (ROOT / path).read_bytes()
        assert picture.startswith(b'\x89PNG') and len(picture) < 60_000, f'{path} has {len(picture):,} bytes'
        assert len(words.split()) > 8, f'{path} needs words for those who do not see it'


def test_links_inside_lead_to_headings():
    "As GitHub and the site make anchors: lower case, hyphens for spaces, no punctuation."
    headings = {re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-') for heading in re.findall(r'^#+ (.+)$', README, re.M)}
    anchors = re.findall(r'\]\(#([^)]+)\)', README)
    assert len(anchors) >= len(TOOLS) and set(anchors) <= headings


def test_it_is_read_in_four_minutes():
    "250 words a minute, without code, pictures, links and the licence."
    prose = re.sub(r'\]\([^)]*\)|<!--.*?-->', ' ', PICTURE.sub('', BLOCK.sub('', README.partition('## Licence')[0])), flags=re.S)
    words = re.findall(r'\w\S*', prose)
    assert 300 < len(words) < 1000, f'{len(words)} words'


def test_the_table_has_the_figures_that_were_measured(monkeypatch):
    "What the notebook's cells make of benchmarks/figures.json now is what the README shows."
    cells = json.loads((ROOT / 'nbs/index.ipynb').read_text(encoding='utf-8'))['cells']
    sources = [''.join(cell['source']) for cell in cells if cell['cell_type'] == 'code']
    look_up, table = (next(source for source in sources if f'def {name}(' in source) for name in ('measured', 'short'))
    monkeypatch.chdir(ROOT / 'nbs')
    space = dict(json=json, re=re, Path=Path, Markdown=str)
    exec(look_up, space)
    *body, last = ast.parse(table).body
    exec(compile(ast.Module(body, []), 'index.ipynb', 'exec'), space)
    found = eval(compile(ast.Expression(last.value), 'index.ipynb', 'eval'), space)
    assert found in README, 'benchmarks/figures.json has changed: make notebooks NB=nbs/index.ipynb, then make prepare'


@pytest.mark.parametrize('change', ['nothing', 'prose', 'picture', 'picture gone', 'picture too many'])
def test_out_of_step_is_noticed(tmp_path, python, change):
    for name in ('scripts/make_readme.py', 'nbs/index.ipynb', 'README.md', *(path for _, path in PICTURE.findall(README))):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tmp_path / name)
    picture = tmp_path / 'nbs/images/pool.png'
    if change == 'prose': (tmp_path / 'README.md').write_text(README.replace('Four tools', 'Five tools'), encoding='utf-8')
    if change == 'picture': picture.write_bytes(picture.read_bytes() + b'.')
    if change == 'picture gone': picture.unlink()
    if change == 'picture too many': shutil.copy(picture, picture.with_name('old.png'))
    done = python(tmp_path / 'scripts/make_readme.py', '--check', cwd=tmp_path)
    assert done.returncode == (change != 'nothing'), done.stdout + done.stderr
