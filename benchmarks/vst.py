"""The generator of synth data sets beside the plain design: the same plugins, patches and notes, one run, in turns.

    python -m benchmarks.vst                      # everything: about 25 minutes on an idle machine with two cores
    python -m benchmarks.vst --quick              # the same measures, small, in about five minutes
    python -m benchmarks.vst --only sample        # one of: sample parameters processing scaling kill faults reader compression

**sample**: processor time of a 4 s stereo sample, of all processes that work on it, against the plain design: the loop
that published research scripts share. They keep one plugin loaded, set each parameter as `plugin.parameters[name]
.raw_value = value`, render with `reset=True`, measure loudness with pyloudnorm, take the mel spectrogram with librosa and
write float16 audio, float32 mel and parameters to uncompressed HDF5 with h5py; quiet patches are drawn again. Some render
32 silent seconds and reset before and after all this, three times in all: that is `with flushes`. Ours renders each
sample in a fork, writes it so that a kill loses nothing, and repacks finished chunks; all of that is counted. Stages of
both are measured apart. Whether both designs give the same audio is said, too: the test synth has an oscillator that runs
on from the moment of loading, which a reset takes back to the start and a fork does not, so there they differ. **parameters**: setting 800 parameters, and loading. **processing**: loudness, mel spectrogram
and writing on rendered audio. **scaling**: processor time of a sample with 1, 2 and 4 workers. **kill**: SIGKILL of the
program, or of one of its processes, at random moments: how many data sets end in the same bytes. **faults**: a plugin
that crashes in 1 % and hangs in 1 % of the samples. **reader**: random samples against raw h5py on files that are open
already, and what else reading offers. **compression**: size and time of what a data set can be packed with.

The plugins: a JUCE synth of 772 parameters (2,853 with the MIDI controllers that JUCE adds), compiled by `sh
benchmarks/juce_synth/build.sh` the first time; the instrument of tests/plugin (44); and the same one with the 2,080
parameters for MIDI that its framework adds. What cannot be built is left out with a line that says so.

Compiled code is compiled, plugins are loaded and files are in the page cache before anything is timed. Each design runs
in a process of its own, with the modules that it needs; both get the same patches.
"""
import os

for _name in ('NUMBA_NUM_THREADS', 'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ.setdefault(_name, '1')

import argparse
import hashlib
import json
import multiprocessing
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import psutil

from benchmarks._harness import ROOT, Row, Times, in_turns, machine, processor_seconds, save, say, show
from datatools.jobs import Task, run_tasks
from datatools.vst.chunks import COMPRESSIONS, PartialChunk
from datatools.vst.config import GenerateConfig, chunk_sizes
from datatools.vst.features import MelSpectrogram, integrated_loudness
from datatools.vst.generate import BLOCK, Draw, chunk_layout, chunk_path, describe, draw, judge, partial_path, plan, render_block
from datatools.vst.host import load_instrument, midi_messages, parameter_facts
from datatools.vst.isolation import ForkIsolation
from datatools.vst.params import draft_spec
from datatools.vst.reader import ChunkedDatasetReader

RATE, SECONDS, CHANNELS = 44_100, 4., 2
FRAMES = round(RATE * SECONDS)


# ---------------------------------------------------------------- plugins and processes

class Plugins:
    "Where the plugins are, built if need be; None for those that cannot be"
    def __init__(self): self._found = {}

    def __getattr__(self, name):
        if name not in self._found: self._found[name] = getattr(self, f'_find_{name}')()
        return self._found[name]

    def _find_juce(self): return self._built(ROOT / 'benchmarks/results/juce/JuceSynth.vst3', ['sh', ROOT / 'benchmarks/juce_synth/build.sh'])
    def _find_small(self): return self._built(None, [sys.executable, ROOT / 'tests/plugin/build.py'])
    def _find_large(self): return self._built(None, [sys.executable, ROOT / 'tests/plugin/build.py', 'UNPATCHED'])

    def _built(self, path, command):
        if path is not None and path.is_dir(): return str(path)
        say(f'building a plugin: {" ".join(map(str, command))}')
        done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
        if done.returncode == 0: return done.stdout.split('\n')[-2]
        say(f'left out: {(done.stderr.strip() or "it cannot be built").splitlines()[-1]}')

    def all(self): return {name: path for name, path in {'JUCE synth': self.juce, 'test synth': self.small, 'test synth, 2,124 parameters': self.large}.items() if path}


class Apart:
    "A spawned process that keeps what is loaded in it; a call gives (value, wall seconds, processor seconds with children)"
    def __init__(self): self.pool = ProcessPoolExecutor(1, multiprocessing.get_context('spawn'))
    def __call__(self, function, *arguments): return self.pool.submit(timed, function, *arguments).result()
    def __enter__(self): return self
    def __exit__(self, *_): self.pool.shutdown()


def timed(function, *arguments):
    wall, processor = time.perf_counter(), processor_seconds()
    value = function(*arguments)
    return value, time.perf_counter() - wall, processor_seconds() - processor


def write_set(path, count, file, **weights):
    "Draft a parameter set: the first `count` parameters of a plugin, without those that make it misbehave"
    facts = [entry for entry in parameter_facts(load_instrument(path)) if entry['name'] not in ('bypass', 'leakage', 'nondeterministic', 'misbehave')]
    found = draft_spec('benchmark', facts[:count])
    found.to_yaml(file)
    return len(found)


def config_of(place, plugin_path, param_set, samples, each=None, **more):
    return GenerateConfig(str(place), samples, str(plugin_path), None, str(param_set), each or samples, **{'duration_seconds': SECONDS, **more})


def generate(config, *words, check=True):
    "Run the command line; (what it says, wall seconds, processor seconds of all its processes)"
    command = [sys.executable, '-m', 'datatools.vst', 'generate', '--config', write_config(config), '--json', '--no-progress', *words]
    done, wall, processor = timed(lambda: subprocess.run(command, cwd=ROOT, capture_output=True, text=True))
    if check and done.returncode: raise SystemExit(f'generate failed:\n{done.stderr[-2000:]}')
    return json.loads(done.stdout or '{}'), wall, processor


def write_config(config):
    file = Path(f'{config.output_dir}.yaml')
    file.write_text(json.dumps({key: value for key, value in vars(config).items() if value is not None}))  # JSON is YAML, too
    return str(file)


def milliseconds(times, calls):
    "Milliseconds of one of several calls"
    return Times(*([1000 * each / calls for each in part] for part in times))


class Stages(dict):
    "Processor seconds by stage"
    def run(self, name, function, *arguments):
        value, _, seconds = timed(function, *arguments)
        self[name] = self.get(name, 0.) + seconds
        return value


# ---------------------------------------------------------------- sample

class Plain:
    "The plain design: one plugin, pedalboard's own interface, pyloudnorm, librosa and h5py"
    def __init__(self, job, flush):
        import librosa
        import pedalboard
        import pyloudnorm
        self.job, self.flush, self.librosa = job, flush, librosa
        self.plugin, _, self.load_seconds = timed(lambda: pedalboard.VST3Plugin(job.config.plugin_path, initialization_timeout=0))
        self.meter = pyloudnorm.Meter(RATE)

    def clear(self):
        self.plugin.process([], 32., RATE, CHANNELS, 2048, True)
        self.plugin.reset()

    def set(self, values):
        for name, value in values.items(): self.plugin.parameters[name].raw_value = value

    def play(self, notes): return self.plugin.process(midi_messages(notes, SECONDS), SECONDS, RATE, CHANNELS, 2048, True)
    def loudness(self, audio): return self.meter.integrated_loudness(audio.T)

    def mel(self, audio):
        power = self.librosa.feature.melspectrogram(y=audio, sr=RATE, n_fft=1102, hop_length=441, window='hamming', n_mels=128, fmax=RATE / 2)
        return self.librosa.power_to_db(power, ref=np.max)

    def sample(self, index, stages):
        for attempt in range(100):
            patch, notes = draw(self.job, index, attempt)
            if self.flush: stages.run('flush', self.clear)
            stages.run('set parameters', self.set, patch.parameters)
            if self.flush: stages.run('flush', self.clear)
            audio = stages.run('render and reset', self.play, notes)
            if self.flush: stages.run('flush', self.clear)
            if stages.run('loudness', self.loudness, audio) >= self.job.config.min_loudness: return patch, audio
        raise SystemExit(f'plain design: sample {index} stays silent')

    def chunk(self, number):
        "Make one chunk file"
        layout, stages = chunk_layout(self.job, number), Stages()
        with h5py.File(Path(self.job.config.output_dir) / f'plain{"_flush" * self.flush}_{number}.h5', 'w') as file:
            audio = file.create_dataset('audio', (layout.samples, CHANNELS, FRAMES), np.float16)
            mel = file.create_dataset('mel_spec', (layout.samples, *layout.mel_shape), np.float32)
            parameters = file.create_dataset('param_array', (layout.samples, layout.param_count), np.float32)
            for row in range(layout.samples):
                patch, sound = self.sample(layout.first + row, stages)
                spectrum = stages.run('mel', self.mel, sound)
                def write(): audio[row], mel[row], parameters[row] = sound, spectrum, self.job.spec.encode(patch)
                stages.run('write', write)
        return stages


_plain = {}  # in its process: with and without flushes


def plain_chunk(job, number, flush):
    if flush not in _plain: _plain[flush] = Plain(job, flush)
    return dict(_plain[flush].chunk(number)), _plain[flush].load_seconds


def our_chunk(job, number):
    made = render_block(job, number, 0, chunk_layout(job, number).samples)
    if made['given_up']: raise SystemExit(f'ours: samples were given up: {made["given_up"]}')
    return made['rejections']


def our_stages(job, number):
    "The parts of our design, one after the other"
    config, layout, stages = job.config, chunk_layout(job, number), Stages()
    instrument = load_instrument(config.plugin_path)
    shape = SECONDS, RATE, CHANNELS
    forked = ForkIsolation(instrument, *shape)
    mel, path = MelSpectrogram(RATE), Path(config.output_dir) / 'stages.h5'
    forked.render(*drawn_values(draw(job, 0, 0)))
    part = stages.run('write', PartialChunk.create, partial_path(path), layout, job.hash)
    for row in range(layout.samples):
        for attempt in range(100):
            drawn = stages.run('draw and encode', draw, job, layout.first + row, attempt)
            rendering = stages.run('fork', forked.render, *drawn_values(drawn))
            cause, loudness = stages.run('loudness', judge, rendering.audio, config)
            if not cause: break
        spectrum = stages.run('mel', mel, rendering.audio)
        vector, note = stages.run('draw and encode', job.spec.encode, drawn.patch), drawn.patch.note
        stages.run('write', part.write, row, rendering.audio, spectrum, vector, note.pitch, note.velocity, (note.start, note.end), loudness, attempt)
    stages.run('finish', part.finish, path, lambda vector, row: describe(job, vector))
    path.unlink()
    for row in range(layout.samples):  # the same again without forks, to tell what the plugin itself takes
        for attempt in range(100):
            drawn = draw(job, layout.first + row, attempt)
            stages.run('set parameters', instrument.set_raw_values, drawn.patch.parameters)
            audio = stages.run('render', instrument.render, drawn.notes, *shape)
            if not judge(audio, config)[0]: break
    stages['fork'] -= stages['set parameters'] + stages['render']
    return {name: stages[name] for name in ('draw and encode', 'set parameters', 'fork', 'render', 'loudness', 'mel', 'write', 'finish')}


def drawn_values(drawn: Draw): return drawn.patch.parameters, drawn.notes


def sample(plugins, place, quick):
    rows = []
    for name, path in plugins.all().items():
        say(f'sample: {name}')
        rows += _sample_of(name, path, Path(place) / name.replace(' ', '_').replace(',', ''), quick)
    return rows


def _sample_of(name, path, place, quick):
    each, rounds, flushed = (6, 2, 1) if quick else (16, 7, 2)
    place.mkdir()
    with Apart() as here: count = here(write_set, path, 162, place / 'set.yaml')[0]
    config = config_of(place / 'data', path, place / 'set.yaml', each * (rounds + 1), each)
    job, _ = plan(config)
    os.mkdir(config.output_dir)
    seconds, stages = {'datatools': Times([], []), 'plain design': Times([], []), 'plain design with flushes': Times([], [])}, {'plain': [], 'ours': []}
    with Apart() as ours, Apart() as plain, Apart() as flushing:
        for number in range(rounds + 1):  # the first is not counted: it loads and compiles
            runs = {'datatools': (ours, our_chunk, job, number), 'plain design': (plain, plain_chunk, job, number, False)}
            if number <= flushed: runs['plain design with flushes'] = flushing, plain_chunk, job, number, True
            for who, (process, *call) in runs.items():
                value, wall, processor = process(*call)
                if number: seconds[who].wall.append(wall), seconds[who].processor.append(processor)
                if who == 'plain design': parts, load_seconds = value
            if number:
                stages['plain'].append(parts)
                stages['ours'].append(ours(our_stages, job, number)[0])
        same = _same_sound(config, rounds)
    measure = f'sample, {name}, {count} parameters set: ms of processor time for 4 s of stereo'
    seconds = {who: [1000 * each_ / each for each_ in times.processor] for who, times in seconds.items()}
    ours, juce = float(np.median(seconds['datatools'])), 'JUCE' in name
    rows = [Row(measure, 'datatools', seconds['datatools'], 'ms')]
    for who in ('plain design', 'plain design with flushes'):
        ratio = float(np.median(seconds[who])) / ours
        rows.append(Row(measure, who, seconds[who], 'ms', times=ratio, **(dict(target='≥ 25x', met=ratio >= 25) if juce else {}),
                        note=f'loading once, {load_seconds:.1f} s, not counted; {same}' if who == 'plain design' else ''))
    for who in ('ours', 'plain'):
        for stage in stages[who][0]: rows.append(Row(measure, f'  {who}: {stage}', [1000 * parts[stage] / each for parts in stages[who]], 'ms'))
    shutil.rmtree(config.output_dir)
    done, _, processor = generate(config_of(place / 'whole', path, place / 'set.yaml', 4 * each * rounds, 100))
    rows.append(Row(measure, 'datatools, a whole run from the command line', [1000 * processor / done['samples']], 'ms', note=f'{done["samples"]} samples, start and end included'))
    return rows


def _same_sound(config, rounds):
    "How much of the audio is the same in both designs"
    same = total = 0
    for number in range(1, rounds + 1):
        with h5py.File(chunk_path(config, number)) as ours, h5py.File(Path(config.output_dir) / f'plain_{number}.h5') as plain:
            for row in range(len(ours['audio'])):
                same += np.allclose(ours['audio'][row].astype(np.float32), plain['audio'][row].astype(np.float32), atol=1e-3)
                total += 1
    return f'the same audio in {same} of {total} samples'


# ---------------------------------------------------------------- parameters

def parameters(plugins, place, quick):
    rows = []
    for name, path in plugins.all().items():
        if name == 'test synth': continue  # too few of them
        say(f'parameters: {name}')
        with Apart() as process: times, loading, count = process(set_800, path, 2 if quick else 9)[0]
        measure = f'parameters, {name} ({count:,} in all): setting 800'
        ours = float(np.median(times['datatools'].processor))
        rows.append(Row(measure, 'datatools, PluginHost.set_raw_values', times['datatools'], 'ms', target='≤ 1 ms', met=ours <= 1))
        for who in list(times)[1:]: rows.append(Row(measure, who, times[who], 'ms', times=float(np.median(times[who].processor)) / ours, note='20 set, times 40'))
        rows += [Row(f'loading, {name}', who, Times([1000 * wall], [1000 * processor]), 'ms') for who, (wall, processor) in loading.items()]
    return rows


def set_800(path, rounds):
    "In a process of its own: times of setting, and of loading"
    import pedalboard
    host, *ours = timed(load_instrument, path)  # pedalboard was imported before, for both
    plugin, *theirs = timed(lambda: pedalboard.VST3Plugin(path, initialization_timeout=0))
    values = dict(zip(host.names[:800], np.random.default_rng(0).random(800).tolist()))
    known = {*plugin.parameters}
    few = [name for name in host.names if name in known][:20]
    now = {name: getattr(plugin, name) for name in few}

    def loop():
        for name in few: plugin.parameters[name].raw_value = values[name] if name in values else .5

    def attributes():
        for name in few: setattr(plugin, name, now[name])

    host.set_raw_values(values)
    if len(values) != 800 or len(few) != 20: raise SystemExit(f'parameters: {len(values)} and {len(few)} parameters in place of 800 and 20')
    got = host.raw_values
    if sum(abs(got[name] - value) < 1e-3 for name, value in values.items()) < 600: raise SystemExit('parameters: they have not been set')  # choices snap
    def ours_20_times():
        for _ in range(20): host.set_raw_values(values)

    times = in_turns({'datatools': ours_20_times, 'plugin.parameters[name].raw_value = value': loop, 'setattr(plugin, name, value)': attributes}, rounds)
    scaled = {who: milliseconds(each, 20 if who == 'datatools' else 1 / 40) for who, each in times.items()}
    return scaled, {'datatools': ours, 'pedalboard.VST3Plugin': theirs}, len(host.names)


# ---------------------------------------------------------------- processing

def rendered(plugin_path, param_set, count):
    "Job, and audio of its first samples that are loud enough"
    config = config_of('/nowhere', plugin_path, param_set, 10 * count)
    job, isolation = plan(config)[0], ForkIsolation(load_instrument(plugin_path), SECONDS, RATE, CHANNELS)
    sounds = (isolation.render(*drawn_values(draw(job, index, 0))).audio.copy() for index in range(10 * count))
    return job, [audio for _, audio in zip(range(count), (audio for audio in sounds if not judge(audio, config)[0]))]


def _fill(job, path, sounds, spectra):
    "A partial chunk with these samples"
    layout = replace(chunk_layout(job, 0), samples=len(sounds))
    vector, note = job.spec.encode(draw(job, 0, 0).patch), draw(job, 0, 0).patch.note
    partial_path(path).unlink(missing_ok=True)
    part = PartialChunk.create(partial_path(path), layout, job.hash)
    def write():
        for row, (audio, mel) in enumerate(zip(sounds, spectra)): part.write(row, audio, mel, vector, note.pitch, note.velocity, (note.start, note.end), -20., 0)
    return part, write


def processing(plugins, place, quick):
    import librosa
    import pyloudnorm
    count, rounds = (8, 3) if quick else (24, 9)
    job, sounds = rendered('builtin', 'builtin', count)
    measured, meter, path = MelSpectrogram(RATE), pyloudnorm.Meter(RATE), Path(place) / 'processing.h5'
    spectra, keep = [measured(audio) for audio in sounds], {}

    def their_mel(audio):
        power = librosa.feature.melspectrogram(y=audio, sr=RATE, n_fft=1102, hop_length=441, window='hamming', n_mels=128, fmax=RATE / 2)
        return librosa.power_to_db(power, ref=np.max)

    part, write = _fill(job, path, sounds, spectra)
    write()
    their_file = h5py.File(Path(place) / 'h5py.h5', 'w')
    theirs = their_file.create_dataset('audio', (count, CHANNELS, FRAMES), np.float16), their_file.create_dataset('mel_spec', (count, *spectra[0].shape), np.float32)
    def their_write():
        for row, (audio, mel) in enumerate(zip(sounds, spectra)): theirs[0][row], theirs[1][row] = audio, mel
        their_file.flush()
    def finish():
        keep['part'].finish(path, lambda vector, row: describe(job, vector))

    def all_of(function):
        def run():
            for audio in sounds: function(audio)
        return run

    contestants = {'datatools: loudness': all_of(lambda audio: integrated_loudness(audio, RATE)), 'pyloudnorm: loudness': all_of(lambda audio: meter.integrated_loudness(audio.T)),
        'datatools: mel': all_of(measured), 'librosa: mel': all_of(their_mel),
        'datatools: write': write, 'h5py: write': their_write, 'datatools: finish': finish}
    for name in list(contestants)[:-1]: contestants[name]()
    times = {name: Times([], []) for name in contestants}
    for _ in range(rounds):
        keep['part'], fill = _fill(job, path.with_name('finish.h5'), sounds, spectra)
        fill()
        for name, each in in_turns(contestants, 1).items(): times[name].wall.extend(each.wall), times[name].processor.extend(each.processor)
    part.close()
    their_file.close()
    times = {name: milliseconds(each, count) for name, each in times.items()}
    def together(*names): return Times(*([sum(parts) for parts in zip(*(times[name][k] for name in names))] for k in (0, 1)))
    all_ours, all_theirs = together('datatools: loudness', 'datatools: mel', 'datatools: write'), together('pyloudnorm: loudness', 'librosa: mel', 'h5py: write')
    measure, ours = f'processing, 4 s of stereo, {count} samples of the built-in synth', float(np.median(all_ours.processor))
    rows = [Row(measure, 'datatools: loudness + mel + write', all_ours, 'ms', target='≤ 12 ms', met=ours <= 12),
        Row(measure, 'pyloudnorm + librosa + h5py', all_theirs, 'ms', times=float(np.median(all_theirs.processor)) / ours),
        Row(measure, 'datatools, finish included', together('datatools: loudness', 'datatools: mel', 'datatools: write', 'datatools: finish'), 'ms')]
    return rows + [Row(measure, f'  {name}', each, 'ms') for name, each in times.items()]


# ---------------------------------------------------------------- scaling

def block_costs(config):
    "Milliseconds of processor time that each sample takes, block by block in the order in which they end, without the first two of each worker; samples/s"
    job, _ = plan(config)
    os.mkdir(config.output_dir)
    blocks = [Task(f'{chunk}:{start}', (job, chunk, start, start + BLOCK)) for chunk, size in enumerate(chunk_sizes(config)) for start in range(0, size, BLOCK)]
    found, begun = [], None
    for number, result in enumerate(run_tasks(render_block, blocks, workers=config.num_workers)):
        if result.error: raise result.error
        if number == 2 * config.num_workers - 1: begun = time.perf_counter()
        elif number >= 2 * config.num_workers: found.append(1000 * result.value['cpu_seconds'] / BLOCK)
    return found, len(found) * BLOCK / (time.perf_counter() - begun)


def scaling(plugins, place, quick):
    rows, (samples, rounds) = [], (12, 2) if quick else (32, 5)
    for name, path in {'built-in synth': 'builtin', 'JUCE synth': plugins.juce}.items():
        if not path: continue
        say(f'scaling: {name}')
        if path == 'builtin': param_set = 'builtin'
        else:
            with Apart() as here: here(write_set, path, 162, param_set := Path(place) / 'set.yaml')
        costs, speeds = {workers: [] for workers in (1, 2, 4)}, {workers: [] for workers in (1, 2, 4)}
        for turn in range(rounds):
            for workers in costs:
                config = config_of(Path(place) / 'scaling', path, param_set, BLOCK * (2 * workers + samples), BLOCK * 8, num_workers=workers)
                found, speed = block_costs(config)
                costs[workers].append(sum(found) / len(found))
                speeds[workers].append(speed)
                shutil.rmtree(config.output_dir)
        measure = f'scaling, {name}, {BLOCK * samples} samples on {os.cpu_count()} cores, workers at full speed'
        one, pace = float(np.median(costs[1])), float(np.median(speeds[1]))
        for workers, values in costs.items():
            change, speed = float(np.median(values)) / one - 1, float(np.median(speeds[workers]))
            target = dict(target='within 10 %', met=abs(change) <= .1) if workers > 1 else {}
            rows.append(Row(measure, f'{workers} worker{"s" * (workers > 1)}: processor time of a sample', values, 'ms', **target,
                note=(f'{change:+.1%}; ' if workers > 1 else '') + f'{speed:.1f} samples/s' + (f', {speed / pace:.2f}x of one worker' if workers > 1 else '')))
    return rows


# ---------------------------------------------------------------- kills

def digest(directory): return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(Path(directory).glob('*.h5'))}


def finished(config):
    "Samples that are safe on the disk"
    count = sum(len(h5py.File(path)['done']) for path in Path(config.output_dir).glob('*.h5'))
    for path in Path(config.output_dir).glob('*.h5.partial'):
        try:
            with h5py.File(path) as file: count += int(file['done'][:].sum())
        except OSError: pass  # killed while it was made: it holds nothing yet
    return count


def started(config):
    command = [sys.executable, '-m', 'datatools.vst', 'generate', '--config', write_config(config), '--json', '--no-progress', '--resume']
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def kill(plugins, place, quick):
    chance, rows, times = random.Random(1), [], 3 if quick else 15
    path = plugins.small or 'builtin'
    param_set = 'builtin'
    if path != 'builtin':
        with Apart() as here: here(write_set, path, 44, param_set := Path(place) / 'set.yaml')
    settings = dict(plugin_path=path, param_set=param_set, samples=96, each=24, duration_seconds=.5, num_workers=2)
    whole = config_of(Path(place) / 'whole', **settings)
    _, seconds, _ = generate(whole)
    same = digest(whole.output_dir)
    for victim in ('the program', 'one of its processes'):
        equal = killed = again = 0
        for n in range(times):
            config = config_of(Path(place) / f'{victim}-{n}', **settings)
            for _ in range(chance.randint(1, 3)):
                run = started(config)
                try: run.wait(chance.uniform(.4, seconds))  # the first of it is start
                except subprocess.TimeoutExpired:
                    below = psutil.Process(run.pid).children(recursive=True) if victim != 'the program' else []
                    target = chance.choice(below) if below else psutil.Process(run.pid)
                    try: target.send_signal(signal.SIGKILL)
                    except psutil.NoSuchProcess: continue  # a fork that has just ended
                    finally:
                        if victim == 'the program' or not below: run.wait()
                        else: run.communicate()
                    killed += 1
            before = finished(config) if Path(config.output_dir).exists() else 0
            done, _, _ = generate(config, '--resume')
            again = max(again, done['rendered_now'] - (settings['samples'] - before))
            equal += digest(config.output_dir) == same
            shutil.rmtree(config.output_dir)
        measure = f'SIGKILL of {victim} at random moments, then --resume; {"test synth" if path != "builtin" else "built-in synth"}, 96 samples, 2 workers, {seconds:.1f} s a run'
        rows += [Row(measure, 'same sha256 of all files as the uninterrupted run', [equal], f'of {times}', target=f'{times}', met=equal == times, note=f'{killed} kills'),
            Row(measure, 'finished samples that were rendered again', [again], '', target='0', met=again == 0, note='lost is what each worker was at: one sample at most')]
    return rows


# ---------------------------------------------------------------- faults

def faults(plugins, place, quick):
    if not plugins.small: return []
    samples = 100 if quick else 400
    with Apart() as here: here(write_faulty_set, plugins.small, Path(place) / 'sound.yaml', {}), here(write_faulty_set, plugins.small, Path(place) / 'faulty.yaml', {'Segfault': .01, 'Hang': .01})
    runs = {}
    for name in ('sound', 'faulty'):
        out = Path(place) / f'run-{name}'
        runs[name] = generate(config_of(out, plugins.small, Path(place) / f'{name}.yaml', samples, 100, num_workers=2, timeout_seconds=1.))
        with ChunkedDatasetReader(out) as reader: there, bad = reader.total_samples, [problem for problems in reader.validate().values() for problem in problems]
        shutil.rmtree(out)
        if name == 'faulty': measure, found = f'faults: 1 % crashes and 1 % hangs among {samples} samples of the test synth, 2 workers, timeout 1 s', (there, bad)
    (done, wall, processor), (_, sound_wall, sound_processor) = runs['faulty'], runs['sound']
    causes = done['rejections']
    hit = f'{causes.get("crash", 0)} draws crashed and {causes.get("timeout", 0)} hung, each tried twice'
    return [Row(measure, 'samples there and sound', [0 if found[1] else found[0]], f'of {samples}', target='all', met=done['complete'] and found == (samples, []), note=hit),
        Row(measure, 'wall clock', [wall], 's', note=f'{sound_wall:.3g} s without faults'), Row(measure, 'processor time', [processor], 's', note=f'{sound_processor:.3g} s without faults')]


def write_faulty_set(path, file, shares):
    "A parameter set in which some patches make the plugin misbehave"
    facts = [entry for entry in parameter_facts(load_instrument(path)) if entry['name'] not in ('bypass', 'leakage', 'nondeterministic')]
    spec = draft_spec('faulty', facts).to_dict()
    entry, = (entry for entry in spec['parameters'] if entry['name'] == 'misbehave')
    entry['weights'] = [shares.get(value, 0.) if value != 'None' else 1 - sum(shares.values()) for value in entry['values']]
    Path(file).write_text(json.dumps(spec))


# ---------------------------------------------------------------- reader

FIELDS = 'audio', 'mel_spec', 'param_array', 'parameters', 'midi_notes', 'velocities', 'loudness', 'note_start_end', 'attempt', 'rejections'


def reader(plugins, place, quick):
    from torch.utils.data import DataLoader
    samples, each, rounds, reads = (48, 12, 3, 100) if quick else (400, 50, 15, 400)
    out = Path(place) / 'data'
    generate(config_of(out, 'builtin', 'builtin', samples, each, num_workers=2))
    files = [h5py.File(path) for path in sorted(out.glob('*.h5'))]
    raw = [{name: file[name] for name in FIELDS} for file in files]
    indices = np.random.default_rng(0).integers(0, samples, reads).tolist()
    ours, rows = ChunkedDatasetReader(out), []

    def with_ours(fields):
        for index in indices: ours.get_sample(index, fields)

    def with_h5py(*names):
        for index in indices:
            chunk, row = raw[index // each], index % each
            for name in names: chunk[name][row]

    def reopened():
        for index in indices[:50]:
            with h5py.File(out / f'dataset_{index // each:04d}.h5') as file: file['audio'][index % each], file['param_array'][index % each]

    for fields, names, name in ((None, FIELDS, 'all fields'), (('audio',), ('audio',), 'audio alone'), (('audio', 'param_array'), ('audio', 'param_array'), 'audio and parameters')):
        contestants = {'datatools, get_sample': lambda: with_ours(fields), 'h5py, files and datasets open': lambda: with_h5py(*names)}
        if name == 'audio and parameters': contestants['h5py, file opened for each sample'] = reopened
        for run in contestants.values(): run()
        times = {who: milliseconds(times, 50 if run is reopened else reads) for (who, times), run in zip(in_turns(contestants, rounds).items(), contestants.values())}
        measure, mine = f'reader, a random sample of {samples}, {name}', float(np.median(times['datatools, get_sample'].wall))
        share = mine / float(np.median(times['h5py, files and datasets open'].wall))
        rows.append(Row(measure, 'datatools, get_sample', times.pop('datatools, get_sample'), 'ms', target='≤ 1.2x of h5py', met=share <= 1.2, note=f'{share:.2f}x of h5py'))
        rows += [Row(measure, who, values, 'ms', times=float(np.median(values.wall)) / mine) for who, values in times.items()]
    for file in files: file.close()

    def loader(workers):
        for _ in DataLoader(ours.torch(('audio', 'param_array')), batch_size=16, shuffle=True, num_workers=workers): pass

    def chunks():
        for chunk in ours.iterate_chunks(): chunk['audio'][:], chunk['param_array'][:]

    def opened(): ChunkedDatasetReader(out).close()
    measure = 'reader, audio and parameters'
    contestants = {'get_random_samples(n)': lambda: ours.get_random_samples(samples, seed=1, fields=('audio', 'param_array')), 'iterate_chunks, whole arrays': chunks,
        'torch DataLoader, batches of 16': lambda: loader(0), 'torch DataLoader, 2 processes, their start included': (lambda: loader(2), 2)}
    rows += [Row(measure, who, times.rates(samples), 'samples/s') for who, times in in_turns(contestants, max(3, rounds // 3)).items()]
    times = in_turns({'open': opened}, rounds)['open']
    return rows + [Row(f'reader, opening a directory of {samples // each} chunks', 'datatools', milliseconds(times, 1), 'ms')]


# ---------------------------------------------------------------- compression

def compression(plugins, place, quick):
    rows, (count, rounds) = [], (8, 2) if quick else (24, 5)
    for name, path in {'built-in synth': 'builtin', 'JUCE synth': plugins.juce}.items():
        if not path: continue
        say(f'compression: {name}')
        with Apart() as process: rows += process(compress_all, name, path, str(place), count, rounds)[0]
    return rows


def compress_all(name, path, place, count, rounds):
    "In a process of its own: size and times of each kind of packing"
    place, param_set = Path(place) / name.replace(' ', '_'), 'builtin'
    place.mkdir()
    if path != 'builtin': write_set(path, 162, param_set := place / 'set.yaml')
    job, sounds = rendered(path, param_set, count)
    spectra, measured = [], MelSpectrogram(RATE)
    for audio in sounds: spectra.append(measured(audio))
    pack, unpack, sizes = {each: Times([], []) for each in COMPRESSIONS}, {each: Times([], []) for each in COMPRESSIONS}, {}
    for turn in range(rounds + 1):
        for each in COMPRESSIONS:
            file = place / f'{each}-{turn}.h5'
            part, write = _fill(job, file, sounds, spectra)
            write()
            for times, call in ((pack, lambda: part.finish(file, lambda vector, row: describe(job, vector), each)), (unpack, lambda: _read_all(file))):
                _, wall, processor = timed(call)
                if turn: times[each].wall.append(1000 * wall / count), times[each].processor.append(1000 * processor / count)  # the first imports filters
            sizes[each] = file.stat().st_size / count
            file.unlink()
    measure, rows = f'compression, {name}, {count} samples', []
    for each in COMPRESSIONS:
        rows += [Row(measure, f'{each}: size of a sample', [sizes[each] / 1e6], 'MB', note=f'{sizes[each] / sizes["none"]:.0%} of none'),
            Row(measure, '  pack', pack[each], 'ms'), Row(measure, '  read', unpack[each], 'ms')]
    return rows


def _read_all(file):
    with ChunkedDatasetReader(file) as opened:
        for sample in opened: sample['audio'], sample['mel_spec']


# ---------------------------------------------------------------- command line

MEASURES = dict(sample=sample, parameters=parameters, processing=processing, scaling=scaling, kill=kill, faults=faults, reader=reader, compression=compression)


def main():
    parser = argparse.ArgumentParser(prog='python -m benchmarks.vst', description=__doc__.partition('\n')[0], allow_abbrev=False)
    parser.add_argument('--quick', action='store_true', help='few samples and few rounds')
    parser.add_argument('--only', action='append', choices=MEASURES, metavar='NAME', help=f'one of {", ".join(MEASURES)}; may be given several times')
    parser.add_argument('--place', type=Path, help='folder for temporary files, some 2 GB; the system\'s by default')
    options = parser.parse_args()
    facts, plugins, rows = machine(), Plugins(), []
    say(f'{facts["cpu"]}, {facts["cores"]} cores, load {facts["load"]}')
    for name in options.only or MEASURES:
        say(name)
        with tempfile.TemporaryDirectory(prefix=f'vst-{name}-', dir=options.place) as place: rows += MEASURES[name](plugins, place, options.quick)
    show(rows, facts)
    save('vst', rows, facts)
    missed = [row for row in rows if row.met is False]
    print(f'\n{sum(row.met is True for row in rows)} targets met, {len(missed)} missed' + ''.join(f'\n  missed: {row.measure}: {row.who}, {row.target}' for row in missed))


if __name__ == '__main__': main()
