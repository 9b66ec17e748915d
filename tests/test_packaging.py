"""The package as others receive it: facts from settings.ini, a wheel that imports, README and pins in step."""
import ast
import re
import sys
import zipfile
from configparser import ConfigParser
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
IMPORT_NAMES = {'pyyaml': 'yaml', 'google-crc32c': 'google_crc32c', 'dask[distributed]': 'distributed'}  # where it is not the name of the distribution


@pytest.fixture(scope='module')
def facts():
    parser = ConfigParser(delimiters=['='])
    parser.read(ROOT / 'settings.ini', encoding='utf-8')
    return parser['DEFAULT']


def names(requirements: str) -> set[str]:
    "Distribution names in a line of requirements, lower case."
    return {re.split(r'[<>=~!]', r)[0].lower() for r in requirements.split()}


def test_installed_facts_are_those_of_settings(facts):
    import datatools
    installed = metadata.metadata('datatools')
    assert datatools.__version__ == installed['Version'] == facts['version']
    assert installed['Requires-Python'] == f'>={facts["min_python"]}'
    scripts = {e.name: e.value for e in metadata.entry_points(group='console_scripts') if e.dist.name == 'datatools'}
    assert scripts == dict([facts['console_scripts'].split('=')])


def test_every_requirement_is_pinned(facts):
    pins = [line for line in (ROOT / 'constraints.txt').read_text(encoding='utf-8').splitlines() if line and line[0] != '#']
    assert all(re.fullmatch(r'[A-Za-z0-9_.-]+==[0-9][0-9a-z.]*(; python_version (<|>=) "3\.\d+")?', pin) for pin in pins)
    wanted = names(' '.join(facts[k] for k in ('requirements', 'dev_requirements', 'cluster_requirements')))
    assert {re.sub(r'\[.*', '', name) for name in wanted} <= {pin.split('==')[0].lower() for pin in pins}


def test_modules_import_only_what_the_package_requires(facts):
    "The package must work without the development extras, and name all it needs."
    required = names(facts['requirements']) | names(facts['cluster_requirements'])
    known = sys.stdlib_module_names | {IMPORT_NAMES.get(r, r) for r in required} | {'datatools', 'dask'}
    for path in (ROOT / 'datatools').rglob('*.py'):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            used = [a.name for a in node.names] if isinstance(node, ast.Import) else \
                [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            unknown = {u.split('.')[0] for u in used} - known
            assert not unknown, f'{path.relative_to(ROOT)} imports {unknown}, which settings.ini does not require'


def test_readme_is_in_step(python):
    done = python('scripts/make_readme.py', '--check')
    assert done.returncode == 0, done.stdout


def test_wheel_holds_the_package_and_imports(tmp_path, python, facts):
    pytest.importorskip('setuptools', reason='no setuptools here to build a wheel with')
    done = python('-m', 'pip', 'wheel', '--quiet', '--no-deps', '--no-build-isolation', '--wheel-dir', tmp_path, source(tmp_path))
    assert done.returncode == 0, done.stderr
    wheel, = tmp_path.glob('*.whl')
    held = {name for name in zipfile.ZipFile(wheel).namelist() if '.dist-info/' not in name}
    assert held == {p.relative_to(ROOT).as_posix() for pattern in ('*.py', 'data/*.yaml') for p in (ROOT / 'datatools').rglob(pattern)}
    zipfile.ZipFile(wheel).extractall(tmp_path / 'installed')
    code = (f'import sys; sys.path.insert(0, {str(tmp_path / "installed")!r}); import datatools.cli, datatools.groove.__main__, datatools.stft.__main__, datatools.vst.__main__, datatools.pool.__main__; from datatools.vst import load_config, load_param_set; '
            'print(datatools.__file__, load_param_set("surge_full"), load_config("original_config.yaml"))')
    done = python('-c', code, cwd=tmp_path)
    assert str(tmp_path / 'installed') in done.stdout and 'encoded length 300' in done.stdout, done.stderr


def source(folder: Path) -> Path:
    "A copy of what a wheel is built from, so that the checkout stays as it is."
    import shutil
    copy = folder / 'source'
    shutil.copytree(ROOT / 'datatools', copy / 'datatools', ignore=shutil.ignore_patterns('__pycache__'))
    for name in ('settings.ini', 'setup.py', 'pyproject.toml', 'README.md', 'LICENSE'): shutil.copy(ROOT / name, copy)
    return copy
