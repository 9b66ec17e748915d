"""What all tests share: where the project is, where the data lies, how to start a fresh Python."""
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from plugin.build import CannotBuild, build

ROOT = Path(__file__).resolve().parent.parent

# A shell starts background jobs with SIGINT ignored, and children inherit that: the tests of Ctrl-C need it heard.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN: signal.signal(signal.SIGINT, signal.default_int_handler)

LONG = [f'test_{name}.py' for name in ('distributed', 'lab', 'demo', 'cluster', 'readme', 'site', 'info')]


def pytest_collection_modifyitems(items: list):
    "The files that take minutes come first, so that two workers end together (with --no-loadscope-reorder)."
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


@pytest.fixture(scope='session')
def root() -> Path:
    "The folder of the checkout."
    return ROOT


@pytest.fixture(scope='session')
def shared_data() -> Path:
    "Real data beside the checkout; where it is missing the test is skipped, or fails under CI=true."
    named = os.environ.get('DATATOOLS_TEST_DATA')
    folder = Path(named) if named else ROOT.parent / 'shared/data'
    if folder.is_dir(): return folder
    reason = f'no test data in {named or "../shared/data"}; DATATOOLS_TEST_DATA names another folder'
    if os.environ.get('CI') == 'true' and named != 'none': pytest.fail(reason)
    pytest.skip(reason)


@pytest.fixture(scope='session')
def python():
    "Run a fresh Python with these arguments; its output is captured, its exit code is yours to judge."
    def run(*arguments: object, timeout: float = 120, **options) -> subprocess.CompletedProcess:
        options = {'cwd': ROOT, 'text': True, 'capture_output': True, **options}
        return subprocess.run([sys.executable, *map(str, arguments)], timeout=timeout, **options)
    return run


def _needed(reason: str):
    "Skip for this reason, or fail for it under CI=true."
    (pytest.fail if os.environ.get('CI') == 'true' else pytest.skip)(reason)


@pytest.fixture(scope='session')
def plugin_variant():
    "Build a variant of the VST3 test instrument: `plugin_variant('MONO')` is the path of its bundle."
    def variant(*defines: str) -> Path:
        try: return build(*defines)
        except CannotBuild as missing: _needed(str(missing))
    return variant


@pytest.fixture(scope='session')
def test_plugin(plugin_variant) -> Path:
    "The VST3 test instrument of tests/plugin, as it comes."
    return plugin_variant()


@pytest.fixture(scope='session')
def zam_plugin() -> Path:
    "A VST3 effect (one channel in, one out): no instrument."
    path = Path('/usr/lib/vst3/ZamComp.vst3')
    if not path.exists(): _needed('the VST3 effect of the tests needs zam-plugins: apt-get install -y --no-install-recommends zam-plugins')
    return path
