"""Every notebook alone in a fresh process: nbdev_test reuses its workers, so state of one can hide a fault of another."""
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / 'nbs').rglob('*.ipynb')
                   if not any(part[0] in '._' for part in p.relative_to(ROOT).parts))


def run_alone(notebook: str) -> subprocess.CompletedProcess:
    "One notebook under nbdev_test, in a process that has run nothing else."
    command = [Path(sys.executable).parent / 'nbdev_test', '--path', notebook, '--n_workers', '0']
    return subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=600)


@pytest.fixture(scope='module')
def runs(request):
    "All notebooks asked for, started two at a time."
    asked = {item.callspec.params['notebook'] for item in request.session.items
             if item.module is request.module and hasattr(item, 'callspec')}
    with ThreadPoolExecutor(2) as pool:
        yield {notebook: pool.submit(run_alone, notebook) for notebook in sorted(asked)}
        pool.shutdown(cancel_futures=True)


@pytest.mark.drill  # `make test` runs them all before pytest, in workers that go on; this takes as long again
@pytest.mark.parametrize('notebook', NOTEBOOKS)
def test_notebook_alone(notebook, runs):
    done = runs[notebook].result()
    assert done.returncode == 0, f'{notebook} fails when it runs alone:\n{done.stdout}\n{done.stderr}'
