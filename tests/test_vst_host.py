"What can be wrong with a plugin has one clear error each; what is set on a plugin is heard."
import os
import shutil
import signal
import struct
import subprocess
import sys

import numpy as np
import pytest

from datatools.core import DatatoolsError, FormatError, UsageError
from datatools.vst.host import PluginHost, load_instrument, parameter_facts, plugin_fault
from datatools.vst.isolation import Fork, ForkIsolation, NoIsolation, StateIsolation, probe_instrument, try_isolation
from datatools.vst.params import Categorical, Continuous, Note, NoteTimes, ParamSpec, Pitch

NOTES = [Note(60, 100, .05, .3), Note(67, 90, .2, .45)]


def library(path): return next(path.rglob('*.so'))


@pytest.fixture
def wrong(tmp_path, test_plugin):
    "Plugins that are none: name -> path"
    def bundle(name, content=None, machine=library(test_plugin).parent.name):
        path = tmp_path/f'{name}.vst3'
        (folder := path/'Contents'/machine).mkdir(parents=True)
        if content is not None: (folder/f'{name}.so').write_bytes(content)
        return path
    good = library(test_plugin).read_bytes()
    other = good[:18] + struct.pack('<H', 0xb7 if os.uname().machine == 'x86_64' else 0x3e) + good[20:]
    (tmp_path/'text.vst3').write_text('not a plugin')
    (tmp_path/'notes.txt').write_text('not a plugin')
    (tmp_path/'empty folder.vst3').mkdir()
    shutil.copytree(test_plugin, tmp_path/'renamed.vst3')
    return dict(missing=tmp_path/'missing.vst3', text=tmp_path/'text.vst3', notes=tmp_path/'notes.txt', folder=tmp_path, empty=bundle('empty'), nothing=tmp_path/'empty folder.vst3',
                machine=bundle('machine', other), windows=bundle('windows', b'MZ' + good[2:]), renamed=tmp_path/'renamed.vst3', cut=bundle('cut', good[:len(good) // 2]),
                no_plugin=bundle('no_plugin', open(sys.modules['numpy._core._multiarray_umath'].__file__, 'rb').read()))


@pytest.mark.skipif(sys.platform != 'linux', reason='bundles are made of Linux libraries')
@pytest.mark.parametrize('kind, said', dict(missing='There is no such file', text='is not a Linux library', notes='whose name ends in .vst3', folder='whose name ends in .vst3',
    empty='The bundle is empty', nothing='The bundle is empty', machine='is made for .*, this machine is', windows='is not a Linux library', renamed='The bundle was renamed').items())
def test_plugins_that_are_none(wrong, kind, said):
    with pytest.raises(UsageError, match=f'plugin_path=.* is not allowed: it must be a VST3 instrument for this machine. .*{said}') as error: load_instrument(wrong[kind])
    assert str(wrong[kind]) in str(error.value) and '\n' not in str(error.value)


@pytest.mark.parametrize('kind', ['cut', 'no_plugin'])
def test_libraries_that_cannot_be_loaded(wrong, kind):
    assert plugin_fault(wrong[kind]) == ''
    with pytest.raises(DatatoolsError, match=f'{wrong[kind]}: (the plugin cannot be loaded|this plugin cannot be used: the worker was killed by SIGBUS)'): probe_instrument(wrong[kind])


def test_an_effect_is_no_instrument(zam_plugin):
    with pytest.raises(UsageError, match='it must be an instrument. ZamComp is an effect'): load_instrument(zam_plugin)


def test_a_plugin_does_not_change_how_numbers_are_calculated(zam_plugin):
    "This one was built with -ffast-math: loading it has the processor flush small numbers to zero"
    with pytest.raises(UsageError): load_instrument(zam_plugin)
    assert (np.float32([1e-40]) * np.float32(1))[0] > 0


def test_a_bundle_of_two(plugin_variant):
    path = plugin_variant('TWO_PLUGINS')
    with pytest.raises(UsageError, match='It holds TestSynth-TWO_PLUGINS1, TestSynth-TWO_PLUGINS2: name one of them with plugin_name'): load_instrument(path)
    with pytest.raises(UsageError, match="plugin_name='TestSynth' is not allowed: it must be one of TestSynth-TWO_PLUGINS1, "): load_instrument(path, 'TestSynth')
    assert load_instrument(path, 'TestSynth-TWO_PLUGINS2').identity()['name'] == 'TestSynth-TWO_PLUGINS2'


def test_a_plugin_that_crashes_while_it_loads(plugin_variant):
    path = plugin_variant('AT_LOAD=1')
    with pytest.raises(FormatError, match=f'{path}: this plugin cannot be used: the worker was killed by SIGSEGV'): probe_instrument(path)


def test_a_plugin_that_hangs_while_it_loads(plugin_variant):
    with pytest.raises(FormatError, match='this plugin cannot be used: stopped after 1.* seconds'): probe_instrument(plugin_variant('AT_LOAD=4'), timeout=1)


def test_mono(plugin_variant):
    host = load_instrument(plugin_variant('MONO'))
    with pytest.raises(DatatoolsError, match='channels: 1'): host.render(NOTES, .5, 16_000, 2)
    assert host.render(NOTES, .5, 16_000, 1).shape == (1, 8000)


def test_values_that_cannot_be_set(test_plugin):
    host = load_instrument(test_plugin)
    before = host.raw_values
    with pytest.raises(UsageError) as error: host.set_raw_values(dict(filter_cutof=.5, filter_resonance=1.5, volume_db=float('nan'), delay_mix=.1, bypas=0.))
    said = str(error.value)
    assert "'filter_cutof', did you mean 'filter_cutoff'?" in said and 'filter_resonance=1.5' in said and 'volume_db=nan' in said and "'bypas'" in said and 'delay_mix' not in said
    assert host.raw_values == before
    for notes, reason in [([Note(128, 100, 0., 1.)], 'pitch'), ([Note(60, 0, 0., 1.)], 'velocity'), ([Note(60, 100, .3, .2)], 'start'), ([Note(60, 100, .6, .7)], 'start'), ([Note(60, 100, float('nan'), 1.)], 'notes')]:
        with pytest.raises(UsageError, match=reason): host.render(notes, .5, 16_000)
    for sizes, reason in [((0, 16_000), 'duration_seconds'), ((float('nan'), 16_000), 'duration_seconds'), ((.5, 0), 'sample_rate'), ((.5, 44_100.5), 'sample_rate'), ((.5, 16_000, 3), 'channels')]:
        with pytest.raises(UsageError, match=reason): host.render(NOTES, *sizes)


@pytest.mark.parametrize('variant', [(), ('UNPATCHED',)], ids=str)
def test_what_is_set_is_heard(plugin_variant, variant):
    "In a plugin that was just loaded, each parameter sounds as after a detour by another value: to the end of its range, zero included"
    base, sounds = dict(leakage=0., oscillator_3_level=.5, drive_on=1., delay_mix=.5, delay_time=.1, lfo_to_cutoff=.5, lfo_rate=.7, noise_level=.1, filter_key_tracking=.3), {}
    host = PluginHost(plugin_variant(*variant))
    fork = ForkIsolation(host, .5, 16_000)
    names = [name for name in host.names if not name.startswith('midi_') and name not in ('misbehave', 'leakage', 'nondeterministic', 'voices', 'drive_on')]
    def detour(values, notes):
        def play():
            host.set_raw_values({**values, name: .3})
            host.render([], .1, 16_000)
            host.set_raw_values(values)
            return host.render(notes, .5, 16_000)
        return fork.fork.call(play)
    for name in names[::1 if not variant else 11]:
        sounds = []
        for value in (0., 1.):
            direct = fork.render({**base, name: value}, NOTES).audio.copy()
            assert np.array_equal(direct, detour({**base, name: value}, NOTES).audio), (name, value)
            sounds.append(direct)
        assert not np.array_equal(*sounds), name


@pytest.mark.parametrize('kind', [ForkIsolation, StateIsolation])
def test_isolated(test_plugin, kind):
    "What was rendered before does not matter, though the plugin's oscillators and delay run on"
    isolation, base = kind(PluginHost(test_plugin), .5, 16_000), dict(leakage=.5, delay_mix=.5, lfo_to_cutoff=.5, oscillator_1_waveform=0.)
    first = isolation.render(base, NOTES).audio.copy()
    isolation.render({**base, 'filter_cutoff': .9, 'delay_time': .9, 'oscillator_1_waveform': 1.}, NOTES[:1])
    assert np.array_equal(first, isolation.render(base, NOTES).audio)
    without = NoIsolation(PluginHost(test_plugin), .5, 16_000)
    assert not np.array_equal(without.render(base, NOTES).audio, without.render(base, NOTES).audio)


def misbehaving(path, *choices):
    "A parameter set of the test plugin that misbehaves in one of these ways"
    names = ['None', 'Segfault', 'Abort', 'Exit', 'Hang', 'NaN', 'Silence', 'Leak']
    ParamSpec('misbehaving', [Continuous('filter_cutoff', .5, 1.), Categorical('misbehave', choices, [names.index(choice) / 7 for choice in choices])], [Pitch(), NoteTimes(.5)]).to_yaml(path)
    return str(path)


def test_isolation_is_not_judged_by_silence(test_plugin, tmp_path):
    with pytest.raises(DatatoolsError, match=r'20 are silent, 0 fail.*initialization_timeout, or choose another param_set'):
        try_isolation(test_plugin, None, misbehaving(tmp_path/'silent.yaml', 'Silence'), 1, .5, 16_000)
    with pytest.raises(DatatoolsError, match='20 patches in a row could not be rendered: the plugin was killed by SIGSEGV'):
        try_isolation(test_plugin, None, misbehaving(tmp_path/'crashing.yaml', 'Segfault'), 1, .5, 16_000)
    report = try_isolation(test_plugin, None, misbehaving(tmp_path/'both.yaml', 'None', 'Silence'), 2, .5, 16_000, 2, .1)
    assert not report['failed'] and not report['isolations']['fork']['different']


def test_a_rendering_that_the_system_killed_is_no_crash():
    fork = Fork(1, 10)
    rendering = fork.call(lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert (rendering.fault, rendering.audio) == ('error', None) and 'use fewer workers' in rendering.message
    assert fork.call(lambda: os.kill(os.getpid(), signal.SIGSEGV)).fault == 'crash'


def test_midi_controllers_are_no_parameters(plugin_variant):
    host = load_instrument(plugin_variant('UNPATCHED'))
    facts = parameter_facts(host)
    assert len(facts) == 44 and len(host.names) > 2000 and not any(entry['name'].startswith('midi_') for entry in facts)


def test_a_script_without_a_guard_is_told(test_plugin, tmp_path):
    "Processes import the main script: one that starts work when it is imported cannot do that"
    (tmp_path/'script.py').write_text(f'from datatools.vst.isolation import probe_instrument\nprint(probe_instrument({str(test_plugin)!r})["identity"]["name"])\n')
    done = subprocess.run([sys.executable, tmp_path/'script.py'], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode and "if __name__ == '__main__':" in done.stderr.splitlines()[-1]
