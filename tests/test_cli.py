"""The one command over every tool: it starts at once, speaks with one voice, and says what was typed wrongly in one line."""
import json
import os
import pty
import re
import subprocess
import sys
from importlib import import_module

import pytest
import typer
from typer.testing import CliRunner

from datatools.cli import COMMANDS, TOOLS
from datatools.cli import app as whole
from datatools.console import HELP, SHORT

INVOKE = '''
import json, sys
from typer.testing import CliRunner
from datatools.cli import app
done = CliRunner().invoke(app, sys.argv[1:])
loaded = [name for name in ('torch', 'librosa', 'h5py', 'lmdb', 'numba', 'datatools.groove', 'datatools.stft', 'datatools.pool', 'datatools.vst') if name in sys.modules]
print(json.dumps([done.exit_code, done.output, loaded]))
'''


@pytest.mark.parametrize('arguments, code', [(['--help'], 0), (['--version'], 0), ([], 2), (['gruuve'], 2), (['info', 'nowhere'], 2), (['info', 'README.md'], 2)])
def test_no_tool_is_imported_for_what_needs_none(python, arguments, code):
    exit_code, output, loaded = json.loads(python('-c', INVOKE, *arguments).stdout)
    assert (exit_code, loaded) == (code, []), output
    if arguments == ['--help']: assert all(f'\n  {name} ' in output for name in [*TOOLS, *COMMANDS]) and '...' not in output.partition('Commands:')[2]


def test_help_comes_at_once(python):
    "Half a second of processor time, the interpreter included, beside what a bare interpreter with typer needs"
    measure = 'import resource, sys, os; pid = os.fork() or os.execv(sys.executable, [sys.executable, "-c", {!r}, "--help"]); os.wait4(pid, 0)[2]; u = resource.getrusage(resource.RUSAGE_CHILDREN); print(u.ru_utime + u.ru_stime, file=sys.stderr)'
    def cost(code): return min(float(python('-c', measure.format(code)).stderr.split()[-1]) for _ in range(3))
    assert cost('from datatools.cli import main; main()') - cost('pass') < .5


@pytest.mark.parametrize('tool', TOOLS)
def test_a_tool_is_the_same_under_both_names(python, tool):
    one, other = (python('-c', f'from datatools.{module} import app; app(prog_name="tool", args={arguments})').stdout
                  for module, arguments in (('cli', [tool, '--help']), (f'{tool}.__main__', ['--help'])))
    assert 'Usage: tool' in other and one.replace(f'tool {tool}', 'tool') == other


def test_groove_needs_no_torch(python):
    exit_code, output, loaded = json.loads(python('-c', INVOKE, 'groove', '--help').stdout)
    assert exit_code == 0 and not {'torch', 'datatools.stft', 'datatools.vst'} & {*loaded}, output


# ---- every command of every tool

def commands():
    "(name, command) of all there are"
    for tool in TOOLS:
        for name, command in typer.main.get_command(import_module(f'datatools.{tool}.__main__').app).commands.items(): yield f'{tool} {name}', command
    for name in COMMANDS: yield name, typer.main.get_command(import_module(f'datatools.{name}').app)


ALL = dict(commands())
OPTIONS = [(name, option) for name, command in ALL.items() for option in command.params if option.param_type_name == 'option' and option.name != 'help']
SYNONYMS = {'--jobs': '--workers', '--n-jobs': '--workers', '--n-workers': '--workers', '--num-workers': '--workers', '--processes': '--workers', '--random-seed': '--seed',
    '--print-json': '--json', '--as-json': '--json', '--out': '--output-dir', '--out-dir': '--output-dir', '--output-directory': '--output-dir', '--out-midi': '--output',
    '--out-file': '--output', '--continue': '--resume', '--restart': '--resume', '--quiet': '--no-progress', '--bar': '--progress', '--show-progress': '--progress',
    '--max-ram-mb': '--max-memory-gb', '--memory': '--max-memory-gb', '--sampling-rate': '--sample-rate', '--sr': '--sample-rate', '--gpu': '--device'}


def metavar(option):
    "The type of an option, as its help says it: INTEGER, PATH, [a|b]"
    return option.get_help_record(typer.Context(typer.main.get_command(whole)))[0].replace(' / ', ', ').split(', ')[-1].partition(' ')[2]


def names(option): return [*option.opts, *option.secondary_opts]


HOMONYMS = {'--order'}  # of n-grams in groove, of shards in pool: both are published under this name


def test_the_same_option_is_the_same_everywhere():
    seen = {}
    for command, option in OPTIONS:
        for name in {*names(option)} - HOMONYMS:
            first, other = seen.setdefault(name, (command, option))
            choices = '|' in metavar(option) and '|' in metavar(other)  # each command has its own
            assert choices or (metavar(other), other.is_flag, other.multiple) == (metavar(option), option.is_flag, option.multiple), (name, first, command)


@pytest.mark.parametrize('name', HELP)
def test_common_options_have_the_common_words(name):
    users = [(command, option) for command, option in OPTIONS if name in option.opts]
    assert len(users) > 1, 'an option of a single command is not common'
    for command, option in users:
        assert option.help.startswith(HELP[name].rstrip('.')), (command, option.help)
        assert SHORT.get(name, name) in option.opts, (command, option.opts)
        if name == '--progress': assert '--no-progress' in option.secondary_opts
    if name in ('--seed', '--resume', '--json', '--progress', '--device'): assert len({repr(option.default) for command, option in users if command != 'vst generate'}) == 1


def test_nobody_goes_a_way_of_their_own():
    for command, option in OPTIONS:
        for name in names(option):
            if name in SYNONYMS: assert any(SYNONYMS[name] in names(other) for it, other in OPTIONS if it == command), f'{command} {name}: the common name is {SYNONYMS[name]}'
        assert all(re.fullmatch(r'-[a-z]|--[a-z][a-z0-9-]+', name) for name in names(option)), (command, names(option))


def test_everything_is_explained():
    for name, command in ALL.items():
        assert command.help and command.help.rstrip().endswith('.') and '\n\n' not in command.help, name
        for option in command.params: assert option.name == 'help' or option.help and option.help.endswith(('.', ']')), (name, option.name, option.help)
    for tool in TOOLS:
        said = CliRunner().invoke(whole, [tool, '--help']).output
        assert '...' not in said.partition('Commands:')[2], said


def test_every_tool_can_say_what_a_thing_is_and_whether_it_is_sound():
    for tool in TOOLS: assert {f'{tool} info', f'{tool} verify'} <= {*ALL}


@pytest.mark.parametrize('name', [name for name in ALL if name.rpartition(' ')[2] in ('info', 'verify', 'eval', 'stats', 'merge', 'export', 'sample', 'mix-report', 'train', 'sweep', 'inspect-plugin', 'isolation-check', 'generate', 'precompute', 'convert', 'make-shards', 'compress', 'decompress', 'inspect', 'validate')])
def test_results_are_for_machines_too(name): assert any(command == name and '--json' in option.opts for command, option in OPTIONS)


# ---- errors

@pytest.mark.parametrize('name', ALL)
def test_wrong_usage_is_one_line(name):
    for wrong, said in ((['--nonsense'], 'No such option: --nonsense'), (['nowhere', 'nowhere'] * 3 + ['--workers', 'some'], '')):
        done = CliRunner().invoke(whole, [*name.split(), *wrong])
        assert done.exit_code == 2 and done.stderr.startswith('Error: ') and done.stderr.count('\n') == 1 and said in done.stderr and not done.stdout, (name, done.output)


@pytest.mark.parametrize('arguments, said', [
    (['groove', 'train', '--worker', '2'], 'Error: No such option: --worker. Did you mean --workers? See {} groove train --help.'),
    (['pool', 'trian'], "Error: No such command 'trian'. Did you mean 'train'? See {} pool --help."),
    (['vst', 'info'], "Error: Missing argument 'DIR'. See {} vst info --help."),
    (['stft', 'info', 'nowhere'], "Error: STORE='nowhere' is not allowed: it must be a file or directory that exists."),
    (['groove', 'merge', 'a', 'b', '-o', 'c'], "Error: PARTS='a' is not allowed: it must be a file or directory that exists."),
    (['pool', 'mix-report', '.', '--order', 'random'], "Error: Invalid value for '--order': 'random' is not one of 'rounds', 'sequential'. See {} pool mix-report --help.")])
def test_errors_say_what_to_do(arguments, said):
    done = CliRunner().invoke(whole, arguments, prog_name='datatools')
    assert (done.exit_code, done.stderr) == (2, said.format('datatools') + '\n')


@pytest.mark.parametrize('setting, red', [({}, True), ({'NO_COLOR': '1'}, False), ({'NO_COLOR': ''}, True), ({'TERM': 'dumb'}, False)])
def test_red_only_where_it_is_seen(setting, red):
    reader, terminal = pty.openpty()
    environment = {name: value for name, value in os.environ.items() if name != 'NO_COLOR'} | dict(TERM='xterm') | setting
    subprocess.run([sys.executable, '-c', 'from datatools.cli import main; main()', 'info', 'nowhere'], stderr=terminal, stdout=subprocess.DEVNULL, env=environment)
    os.close(terminal)
    said = os.read(reader, 1000).decode()
    os.close(reader)
    assert 'Error: ' in said and ('\x1b[31m' in said) == red


def test_ctrl_c_ends_with_130(monkeypatch):
    import datatools.info
    def interrupted(*_): raise KeyboardInterrupt
    monkeypatch.setattr(datatools.info, 'describe', interrupted)
    assert CliRunner().invoke(whole, ['info', '.']).exit_code == 130


# ---- completion

@pytest.mark.parametrize('line, offered', [
    ('datatools ', [*COMMANDS, *TOOLS]), ('datatools gr', ['groove']), ('datatools pool ma', ['make-shards']), ('datatools pool train --res', ['--resume']), ('datatools stft precompute --durability ', ['fast', 'full'])])
def test_the_shell_completes(python, line, offered):
    environment = dict(os.environ, _DATATOOLS_COMPLETE='complete_bash', COMP_WORDS=line, COMP_CWORD=str(len(line.split(' ')) - 1))
    assert [*python('-c', 'from datatools.cli import main; main()', env=environment).stdout.split()] == offered


def test_the_completion_script_is_shown(python):
    said = python('-c', 'from datatools.cli import main; main()', '--show-completion', 'bash', env=dict(os.environ, _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION='1')).stdout
    assert '_DATATOOLS_COMPLETE=complete_bash' in said and 'complete -o default' in said
