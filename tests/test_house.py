"""House rules over the whole checkout, and proof that the style check sees what it should."""
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / 'scripts'))
import check_notebooks as style  # noqa: E402

INDEX = re.compile(r'--(?:extra-)?index-url|--find-links|--trusted-host|https?://[^\s"\'<>)]*/simple\b')


@pytest.fixture(scope='module')
def tracked():
    "The text files under version control, as {path: content}."
    listed = subprocess.run(['git', 'ls-files', '-z'], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode: pytest.skip('not a git checkout')
    paths = [ROOT / name for name in listed.stdout.split('\0') if name]
    return {p.relative_to(ROOT).as_posix(): p.read_text(encoding='utf-8', errors='replace') for p in paths if p.is_file()}


def test_no_path_of_one_machine(tracked):
    home = re.escape(str(Path.home()))
    found = [name for name, text in tracked.items() if re.search(rf'/home/\w+/|/Users/\w+/|(?<![\w.]){home}/\w', text)
             and name != 'tests/test_house.py']
    assert not found, f'paths of one machine in {found}'


def test_no_package_index_is_written_down(tracked):
    found = [name for name, text in tracked.items() if INDEX.search(text) and name != 'tests/test_house.py']
    assert not found, f'a package index is named in {found}; it belongs in the configuration of the machine'


def cell(number, source, kind='code', outputs=()):
    return style.Cell(number, kind, source, list(outputs))


@pytest.mark.parametrize('rule, wrong', [
    (style.title, cell(0, '# Title without subtitle', 'markdown')),
    (style.front_matter, cell(0, '---\ntitle: T\n---', 'raw')),
    (style.mixed_imports, cell(1, '#| export\nimport os\nx = os.sep')),
    (style.hidden_tests, cell(1, '#| hide\nassert 1 == 1')),
    (style.hidden_tests, cell(1, '#| hide\ntest_eq(1, 1)')),
    (style.hidden_tests, cell(1, '#| echo: false\nwith ExceptionExpected(ValueError): int("a")')),
    (style.hidden_tests, cell(1, '#| eval: false\nassert 1 == 1')),
    (style.machine_paths, cell(1, 'open("/home/someone/a.mid")')),
    (style.machine_paths, cell(1, 'x', outputs=[{'output_type': 'stream', 'text': ['/tmp/tmp1/a.mid']}])),
    (style.saved_errors, cell(1, 'x', outputs=[{'output_type': 'error'}])),
])
def test_style_check_sees(rule, wrong):
    assert list(rule([wrong])), f'{rule.__name__} lets this pass:\n{wrong.source}'


@pytest.mark.parametrize('right', [
    [cell(0, '# Title\n\n> subtitle', 'markdown')],
    [cell(0, '# Title\n\n> subtitle', 'markdown'), cell(1, '#| export\nimport os\nfrom pathlib import Path')],
    [cell(0, '# Title\n\n> subtitle', 'markdown'), cell(1, '#| hide\nimport matplotlib')],
    [cell(0, '# Title\n\n> subtitle', 'markdown'), cell(1, 'def f():\n    import os\n    return os\nassert f()')],
])
def test_style_check_lets_good_notebooks_pass(right):
    assert [finding for rule in style.RULES for finding in rule(right)] == []


def test_notebooks_keep_to_the_house_style(python):
    done = python('scripts/check_notebooks.py')
    assert done.returncode == 0, done.stdout
