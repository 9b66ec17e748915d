"""The one command over every tool: it starts at once, because it imports a tool only when that is used."""
import json

import pytest

INVOKE = '''
import json, sys
from typer.testing import CliRunner
from datatools.cli import app
done = CliRunner().invoke(app, sys.argv[1:])
loaded = [name for name in ('torch', 'librosa', 'h5py', 'lmdb', 'numba', 'datatools.groove', 'datatools.stft', 'datatools.vst') if name in sys.modules]
print(json.dumps([done.exit_code, done.output, loaded]))
'''


@pytest.mark.parametrize('arguments, code', [(['--help'], 0), (['--version'], 0), ([], 2), (['gruuve'], 2)])
def test_no_tool_is_imported_for_what_needs_none(python, arguments, code):
    exit_code, output, loaded = json.loads(python('-c', INVOKE, *arguments).stdout)
    assert (exit_code, loaded) == (code, []), output
    if arguments == ['--help']: assert all(f'\n  {name} ' in output for name in ('groove', 'stft', 'vst'))


@pytest.mark.parametrize('tool', ['groove', 'stft', 'vst'])
def test_a_tool_is_the_same_under_both_names(python, tool):
    one, other = (python('-c', f'from datatools.{module} import app; app(prog_name="tool", args={arguments})').stdout
                  for module, arguments in (('cli', [tool, '--help']), (f'{tool}.__main__', ['--help'])))
    assert 'Usage: tool' in other and one.replace(f'tool {tool}', 'tool') == other


def test_groove_needs_no_torch(python):
    exit_code, output, loaded = json.loads(python('-c', INVOKE, 'groove', '--help').stdout)
    assert exit_code == 0 and not {'torch', 'datatools.stft', 'datatools.vst'} & {*loaded}, output
