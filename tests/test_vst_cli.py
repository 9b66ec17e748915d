"The commands as they are typed: what is printed, what is written, what is refused, and with which exit code."
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from typer.testing import CliRunner

from datatools.vst import ChunkedDatasetReader
from datatools.vst.__main__ import app
from datatools.vst.params import load_param_set

ROOT = Path(__file__).resolve().parent.parent
SHORT = dict(num_samples=6, samples_per_file=4, sample_rate=16_000, duration_seconds=.5)


def command(*arguments, code=0):
    "Run a command in this process: what it printed; an error is one line (or a list of mistakes) and no traceback"
    done = CliRunner().invoke(app, list(map(str, arguments)))
    if done.exception is not None and not isinstance(done.exception, SystemExit): raise done.exception
    assert done.exit_code == code, (done.exit_code, done.output)
    if not code: return done.stdout
    assert done.stderr.startswith(('Error: ', 'Usage: ')) and 'Traceback' not in done.stderr, done.stderr
    return done.stderr


def shell(line, folder, code=0):
    "Run a line as a user would"
    line = line.replace('python ', f'{sys.executable} ', 1).replace('datatools ', f'{Path(sys.executable).parent/"datatools"} ', 1) if line.split()[0] in ('python', 'datatools') else line
    done = subprocess.run(line, shell=True, capture_output=True, text=True, cwd=folder, timeout=120)
    assert done.returncode == code, (done.returncode, done.stdout, done.stderr)
    return done


@pytest.fixture
def config(tmp_path):
    "Write a configuration: `config(seed=1)` is its path"
    def write(**settings):
        path = tmp_path/'config.yaml'
        path.write_text(yaml.safe_dump({**SHORT, 'output_dir': str(tmp_path/'set'), **settings}))
        return path
    return write


SNIPPET = '''
from datatools.vst import ChunkedDatasetReader
reader = ChunkedDatasetReader('datasets/vst_samples')
info = reader.get_dataset_info()
print(f"Total samples: {info['total_samples']}"); print(f"Number of chunks: {info['num_chunks']}")
for sample in reader.get_random_samples(10, seed=42): print(f"Sample {sample['global_id']}: MIDI {sample['midi_note']}")
for chunk in reader.iterate_chunks(): audio = chunk['audio'][:]
'''


def test_the_first_lines_of_the_documentation(tmp_path):
    "From an empty folder: generate, resume, look, validate, read"
    done = shell('python -m datatools.vst.generate --config original_config.yaml', tmp_path)
    assert 'complete                         True' in done.stdout and 'Traceback' not in done.stderr
    folder = tmp_path/'datasets/vst_samples'
    assert sorted(path.name for path in folder.glob('*.h5')) == ['dataset_0000.h5', 'dataset_0001.h5'] and sorted(tmp_path.iterdir()) == [tmp_path/'datasets']
    done = shell('datatools vst generate --config original_config.yaml --resume --json', tmp_path)
    assert json.loads(done.stdout)['rendered_now'] == 0 and not done.stderr
    done = shell('python -m datatools.vst generate --config original_config.yaml', tmp_path, code=2)
    assert done.stderr.count('\n') == 1 and '--resume' in done.stderr and not done.stdout
    assert shell('datatools vst validate datasets/vst_samples', tmp_path).stdout.split() == ['dataset_0000.h5', 'sound', 'dataset_0001.h5', 'sound']
    (tmp_path/'read.py').write_text(SNIPPET)
    lines = shell('python read.py', tmp_path).stdout.splitlines()
    assert lines[:2] == ['Total samples: 20', 'Number of chunks: 2'] and len(lines) == 12 and all(48 <= int(line.split()[-1]) <= 72 for line in lines[2:])


def test_json_is_all_there_is_on_stdout(config, tmp_path):
    summary = json.loads(command('generate', '--config', config(), '--json'))
    assert {'output_dir', 'complete', 'samples', 'rendered_now', 'seconds', 'samples_per_second', 'cpu_seconds_per_sample', 'rejections', 'given_up', 'failed_blocks'} <= {*summary}
    assert summary['complete'] is True and summary['samples'] == summary['rendered_now'] == 6
    info = json.loads(command('info', tmp_path/'set', '--json'))
    assert info['total_samples'] == 6 and info['num_chunks'] == 2 and info['complete'] is True
    assert json.loads(command('inspect-plugin', 'builtin', '--json'))['parameters']
    estimate = json.loads(command('generate', '--config', config(output_dir=str(tmp_path/'other')), '--dry-run', '--json'))
    assert estimate['samples'] == 6 and estimate['total_bytes'] > 6 * 2 * 2 * 8000 and not (tmp_path/'other').exists()


def test_a_trial_writes_nothing(config, tmp_path):
    path = config(num_samples=100_000, samples_per_file=1000)
    before = sorted(tmp_path.rglob('*'))
    said = command('generate', '--config', path, '--dry-run')
    assert sorted(tmp_path.rglob('*')) == before and 'hours' in said and 'total bytes' in said
    command('generate', '--config', path, '--set', 'plugin_path=nothing.vst3', '--dry-run', code=2)


def test_options_replace_keys(config, tmp_path):
    command('generate', '--config', config(), '--set', 'num_samples=3', '--set', 'compression=gzip', '--workers', 2, '--set', f'output_dir={tmp_path}/elsewhere')
    with ChunkedDatasetReader(tmp_path/'elsewhere') as reader: assert len(reader) == 3 and reader.manifest['config']['compression'] == 'gzip'
    assert not (tmp_path/'set').exists()


def test_all_mistakes_of_a_configuration_at_once(config):
    said = command('generate', '--config', config(num_sample=5, num_workers=0, sample_rate='fast', duration_seconds=float('nan'), velocity=-1, clip='sometimes', seed=1.5, isolation=True), code=2)
    assert 'has 8 mistakes' in said and "'num_sample' is not a known key, did you mean 'num_samples'?" in said
    for key in ('num_workers=0', "sample_rate='fast'", 'duration_seconds=nan', 'velocity=-1', "clip='sometimes'", 'seed=1.5', 'isolation=True'): assert key in said


@pytest.mark.parametrize('content, said, code', [('', 'must hold keys and values', 2), ('[1, 2]', 'must hold keys and values', 2), ('a: [', 'config.yaml', 1), (b'\xff\xfe\x00', 'config.yaml', 1),
    ('num_samples: 3\n', 'output_dir is missing', 2), ('output_dir: x\nnum_samples: 3\nnum_samples: 4\n', 'num_samples', 1), ('output_dir: !!python/object/apply:os.system [echo]\n', 'config.yaml', 1)], ids=str)
def test_files_that_are_no_configuration(tmp_path, content, said, code):
    (tmp_path/'config.yaml').write_bytes(content if isinstance(content, bytes) else content.encode())
    assert said in command('generate', '--config', tmp_path/'config.yaml', code=code)


@pytest.mark.parametrize('arguments, said', [(['generate'], 'config'), (['generate', '--config', 'nowhere.yaml'], 'original_config.yaml'), (['generate', '--config', 'original_config.yaml', '--set', 'seed'], '--set'),
    (['generate', '--config', 'original_config.yaml', '--workers', 'many'], 'workers'), (['generat'], 'generat'), (['inspect-plugin', 'nowhere.vst3'], 'There is no such file'),
    (['isolation-check', 'nowhere.vst3'], 'There is no such file'), (['isolation-check', 'builtin', '--seconds', '-1'], '--seconds=-1'), (['isolation-check', 'builtin', '--pairs', '0'], '--pairs=0')], ids=str)
def test_wrong_arguments(arguments, said): assert said in command(*arguments, code=2)


def test_what_is_no_data_set(tmp_path):
    assert command('info', tmp_path/'nowhere', code=2).count('\n') == 1
    (tmp_path/'set').mkdir()
    for name in ('info', 'validate'): assert 'dataset_0000.h5' in command(name, tmp_path/'set', code=2)
    (tmp_path/'set/dataset_0000.h5').write_text('no HDF5')
    for name in ('info', 'validate'): assert command(name, tmp_path/'set', code=1).count('\n') == 1


def test_damage_is_named_and_mended(config, tmp_path):
    command('generate', '--config', config())
    whole = (tmp_path/'set/dataset_0001.h5').read_bytes()
    (tmp_path/'set/dataset_0001.h5').write_bytes(whole[:-500])
    report = CliRunner().invoke(app, ['validate', str(tmp_path/'set'), '--json'])
    assert report.exit_code == 1 and json.loads(report.stdout)['dataset_0000.h5'] == [] and 'cut short' in str(json.loads(report.stdout)['dataset_0001.h5'])
    assert json.loads(command('info', tmp_path/'set', '--json'))['damaged'] == ['dataset_0001.h5']
    said = command('generate', '--config', config(), '--resume', code=1)
    assert 'dataset_0001.h5 is damaged' in said and 'Remove it' in said and said.count('\n') == 1
    (tmp_path/'set/dataset_0001.h5').unlink()
    command('generate', '--config', config(), '--resume')
    assert (tmp_path/'set/dataset_0001.h5').read_bytes() == whole


def test_silence_is_explained(config):
    said = command('generate', '--config', config(min_loudness=-1, max_attempts=3, num_samples=100), code=1)
    assert 'could not be made' in said and 'silent' in said and 'min_loudness' in said and said.count('\n') == 1


def test_incomplete_sets_say_why(config):
    said = command('generate', '--config', config(min_loudness=-23, max_attempts=1, num_samples=20), code=1)
    assert 'The data set is not complete' in said and 'samples were given up' in said and 'silent' in said and '--resume' in said and said.count('\n') == 1


def test_from_a_plugin_to_a_data_set(test_plugin, config, tmp_path):
    "Draft a parameter set, do not overwrite it, use it"
    said = command('inspect-plugin', test_plugin)
    assert 'filter_type' in said and 'Low Pass, Band Pass, High Pass, Notch' in said and '44 parameters' in said
    assert 'written to' in command('inspect-plugin', test_plugin, '-o', tmp_path/'mine.yaml')
    draft = (tmp_path/'mine.yaml').read_text()
    assert 'a new file' in command('inspect-plugin', test_plugin, '-o', tmp_path/'mine.yaml', code=2) and (tmp_path/'mine.yaml').read_text() == draft
    found = yaml.safe_load(draft)
    for entry in found['parameters']:
        if entry['name'] in ('misbehave', 'nondeterministic'): entry['weights'] = [1] + [0] * (len(entry['values']) - 1)
    (tmp_path/'mine.yaml').write_text(yaml.safe_dump(found))
    command('generate', '--config', config(plugin_path=str(test_plugin), param_set=str(tmp_path/'mine.yaml')))
    with ChunkedDatasetReader(tmp_path/'set') as reader:
        spec = load_param_set(str(tmp_path/'mine.yaml'))
        for sample in reader:
            assert [*sample['parameters']] == [*spec.names] and len(sample['param_array']) == spec.encoded_length and np.isfinite(sample['audio']).all()
            assert spec.decode(sample['param_array']).parameters == pytest.approx(sample['parameters'])
    (tmp_path/'set').rename(tmp_path/'kept')
    said = command('generate', '--config', config(plugin_path=str(test_plugin), param_set='builtin'), code=2)
    assert 'parameter' in said and not (tmp_path/'set').exists()


@pytest.mark.parametrize('choices, advice, other', [(dict(), 'fork', ['state', 'none']), (dict(leakage='Instance'), 'fork', ['state']), (dict(nondeterministic='Clock'), '', []),
    *(pytest.param(*case, marks=pytest.mark.drill) for case in ((dict(leakage='Process'), 'fork', []), (dict(nondeterministic='Address'), '', [])))], ids=str)
def test_which_isolation_a_plugin_needs(test_plugin, tmp_path, choices, advice, other):
    command('inspect-plugin', test_plugin, '-o', tmp_path/'mine.yaml')
    found = yaml.safe_load((tmp_path/'mine.yaml').read_text())
    wanted = dict(leakage='None', nondeterministic='Off', misbehave='None') | choices
    for entry in found['parameters']:
        if entry['name'] in wanted: entry['weights'] = [int(value == wanted[entry['name']]) for value in entry['values']]
    (tmp_path/'mine.yaml').write_text(yaml.safe_dump(found))
    arguments = ['isolation-check', test_plugin, '--param-set', tmp_path/'mine.yaml', '--seconds', '.5', '--sample-rate', '16000', '--pairs', '2']
    report = json.loads(command(*arguments, '--json'))
    assert report['advice'] == advice and report['same_in_two_processes'] == (not choices.get('nondeterministic'))
    if advice: assert [name for name in ('state', 'none') if not report['isolations'][name]['different']] == other
    if choices == {}: assert 'advice: isolation: fork' in command(*arguments)


def test_patches_that_fail_are_drawn_again(test_plugin, tmp_path):
    command('inspect-plugin', test_plugin, '-o', tmp_path/'mine.yaml')
    found = yaml.safe_load((tmp_path/'mine.yaml').read_text())
    for entry in found['parameters']:
        if entry['name'] in ('leakage', 'nondeterministic', 'misbehave'): entry['weights'] = [1., 0., 0., *([1.] * 1 + [0.] * 4 if len(entry['values']) == 8 else [])]
    (tmp_path/'mine.yaml').write_text(yaml.safe_dump(found))
    said = command('isolation-check', test_plugin, '--param-set', tmp_path/'mine.yaml', '--seconds', '.5', '--sample-rate', '16000', '--pairs', '4')
    assert 'other patches failed: the plugin ended the process with exit code 3; only fork contains that' in said and 'advice: isolation: fork' in said


def test_interrupted_before_the_first_sample(tmp_path):
    "As the workers start"
    process = subprocess.Popen([sys.executable, '-m', 'datatools.vst', 'generate', '--config', 'dataset_config_large.yaml', '--workers', '1'], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    while not (tmp_path/'datasets').exists() and process.poll() is None: time.sleep(.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    # An interrupted exec, as of an import that makes a dataclass, lets `python -m` die of the signal: a shell calls both 130.
    assert process.returncode in (130, -signal.SIGINT) and 'Interrupted' in errors and 'Traceback' not in errors
    shutil.rmtree(tmp_path/'datasets')

