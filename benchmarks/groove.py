"""The groove trainer beside its peers: same bytes, one run, in turns.

    python -m benchmarks.groove                      # everything: about 20 minutes and 12 GB of temporary disk
    python -m benchmarks.groove --quick              # the same measures, small, in two minutes
    python -m benchmarks.groove --only counting      # one of: counting files bits sampling memory kills

**counting**: tokens of orders 1 to 4 a second on one core, counted as training counts them (pack, tally, then fold
the lower orders), against `nltk.lm.MLE(4).fit`, a `collections.Counter` of tuples, and a sort of the packed keys. Real
drumming repeats itself; a corpus sampled with all novelty repeats itself less, random tokens not at all. **files**: MIDI
files to counts of order 8 on one core, against mido and symusic reading the same files and taking the drum onsets out.
**bits**: how well the held-out test split is foreseen, trained on the train split, against KenLM's modified
Kneser–Ney and NLTK on the same tokens. KenLM also reads our exported ARPA file and must score it as we do.
**sampling**: onsets a second of `generate`, velocity and micro-timing included, with a thread per core (the column
`by processor` is one core's speed), and the share of simultaneous hits against the training data. **memory**: peak resident memory, speed and disk of the command line over corpora of growing
size that never stop bringing new n-grams. **kills**: training killed (SIGKILL) at random moments and resumed, and
random shards merged in random order: how many ended in the same bytes.

Compiled code is compiled, and files are in the page cache, before anything is timed. Every contestant is run once per
round, in turns. Seconds are wall clock: look at the load in the first line of the output.

Peers come from benchmarks/requirements.txt. KenLM is compiled by `sh benchmarks/build_kenlm.sh`, which needs a C++
compiler, cmake and Boost; `KENLM_LMPLZ` names an `lmplz` elsewhere (built for orders up to 8). What is not found is
left out with a line that says so.
"""
import os

for _name in ('NUMBA_NUM_THREADS', 'OMP_NUM_THREADS', 'OPENBLAS_NUM_THREADS', 'MKL_NUM_THREADS'): os.environ.setdefault(_name, '1')

import argparse
import csv
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
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

import mido
import numpy as np
import symusic
from numba import njit

from benchmarks._harness import ROOT, Row, in_turns, machine, save, say, show
from datatools.groove.arpa import token_words, write_arpa
from datatools.groove.counts import KeyLayout, Tally, fold_order, ngram_keys
from datatools.groove.events import GrooveConfig
from datatools.groove.files import BATCH_ONSETS, FileList, count_files
from datatools.groove.model import GrooveModel, as_events, table_layout
from datatools.groove.smoothing import build_trie, forecast, score_tokens
from datatools.groove.stores import MemoryStore
from datatools.groove.train import Run, merge_files, train_model

DATA = ROOT.parent / 'shared/data/groove_midi'


# ---------------------------------------------------------------- the corpus

class Corpus:
    "The Groove MIDI Dataset and its tokens"
    def __init__(self, folder):
        self.folder = Path(folder)
        with open(self.folder / 'info.csv', newline='') as file: rows = list(csv.DictReader(file))
        self.split = {name: [str(self.folder / row['midi_filename']) for row in rows if row['split'] == name] for name in ('train', 'validation', 'test')}
        self.files = sorted(str(path) for path in self.folder.rglob('*.mid'))

    def events(self, files, config):
        "(Events of each file that the configuration keeps)"
        read = (as_events(path, config)[0] for path in files if os.path.getsize(path) >= config.min_bytes)
        return [events for events in read if len(events.token) >= config.min_notes]


def joined(performances):
    "Tokens one after the other, and where each performance begins"
    return np.concatenate([events.token for events in performances]), np.cumsum([0] + [len(events.token) for events in performances])


def command(*words, **options):
    "The standard output of the groove command line, as JSON"
    done = subprocess.run([sys.executable, '-m', 'datatools.groove', *map(str, words)], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)
    if done.returncode: raise SystemExit(f'groove {" ".join(map(str, words))} failed:\n{done.stderr[-2000:]}')
    return json.loads(done.stdout)


# ---------------------------------------------------------------- counting

def count_orders(token, starts, config):
    "Counts of orders 4, 3, 2 and 1, in batches as large as training's"
    layout, tally, begin = KeyLayout((config.token_bits,) * 4), Tally(1), 0
    while begin < len(starts) - 1:
        end = max(begin + 1, int(np.searchsorted(starts, starts[begin] + BATCH_ONSETS)))
        part = starts[begin:end + 1] if end < len(starts) else starts[begin:]
        tally.add(ngram_keys(token[part[0]:part[-1]], part - part[0], config.vocabulary, layout))
        begin += len(part) - 1
    table = tally.take()
    return [table, *(fold_order(*table, layout, fields) for fields in (3, 2, 1))]


def counting(corpus, quick):
    config = GrooveConfig(min_bytes=0, min_notes=1)
    token, starts = joined(corpus.events(corpus.files[::4] if quick else corpus.files, config))
    count_orders(token, starts, config)
    sentences = [list(map(str, token[a:b].tolist())) for a, b in zip(starts, starts[1:])]
    rows = _count_real(token, starts, sentences, config, 2 if quick else 5)
    size = 1_000_000 if quick else 5_000_000
    times = -(-size // len(token))
    model = GrooveModel(config).fit(corpus.split['train'][:100] if quick else corpus.split['train'])
    bars = 512
    grooves = model.generate(bars, max(1, size // 10_000), novelty=1.0, recall=False)
    noise = np.random.default_rng(0).integers(0, config.vocabulary, size).astype(np.uint16)
    for name, tokens, begins in (
            ('the same tokens, over and over', np.tile(token, times), np.concatenate([[0], np.cumsum(np.tile(np.diff(starts), times))])),
            ('sampled with all novelty', grooves.token, grooves.starts),
            ('random tokens, the worst case', noise, np.arange(0, size + 1, 1000))):
        rows += _count_more(name, tokens, begins, config, 3 if quick else 7)
    return rows


def _speeds(seconds, amount): return {name: times.rates(amount) for name, times in seconds.items()}


def _sorted_keys(token, starts, config):
    layout = KeyLayout((config.token_bits,) * 4)
    keys, counts = np.unique(ngram_keys(token, starts, config.vocabulary, layout)[:, 0], return_counts=True)
    return [fold_order(keys[:, None], counts, layout, fields) for fields in (4, 3, 2, 1)]


def _count_real(token, starts, sentences, config, rounds):
    "Real drumming against NLTK, Counter and sorting"
    words = [['<s>'] * 3 + sentence for sentence in sentences]
    found = {}
    def counter(): found['counter'] = [Counter(gram for line in words for gram in zip(*(line[k:] for k in range(n)))) for n in (4, 3, 2, 1)]
    def ours(): found['ours'] = count_orders(token, starts, config)
    contestants = {'datatools': ours, 'numpy sort': lambda: _sorted_keys(token, starts, config), 'collections.Counter': (counter, 2)}
    if find_spec('nltk'):
        from nltk.lm import MLE
        from nltk.lm.preprocessing import padded_everygram_pipeline
        def nltk():
            found['nltk'] = MLE(4)
            found['nltk'].fit(*padded_everygram_pipeline(4, sentences))
        contestants['nltk MLE(4).fit'] = nltk, 3
    else: say('counting: nltk is not installed')
    speed = _speeds(in_turns(contestants, rounds), len(token))
    (keys, counts), ours_median = found['ours'][0], float(np.median(speed['datatools'].wall))
    same = [sum(gram[-1] != '<s>' for gram in found['counter'][0]) == len(counts)]
    if 'nltk' in found:
        grams = {(*context, word): count for context, follow in found['nltk'].counts[4].items() for word, count in follow.items() if word not in ('<s>', '</s>')}
        fields = KeyLayout((config.token_bits,) * 4).unpack(keys)[:, ::-1].tolist()
        names = [str(each) for each in range(config.vocabulary)] + ['<s>']
        same.append(grams == {tuple(names[field] for field in row): count for row, count in zip(fields, counts.tolist())})
    if not all(same): raise SystemExit(f'counting: the contestants disagree: {same}')
    measure = f'counting, orders 1–4, {len(token):,} tokens of real drumming ({len(counts):,} distinct 4-grams)'
    rows = [Row(measure, 'datatools', speed['datatools'], 'tokens/s', target='≥ 10 M, stretch 18 M', met=ours_median >= 10e6, note='equal to the counts of NLTK' if len(same) > 1 else '')]
    for name in list(contestants)[1:]:
        wanted = dict(target='≥ 130x', met=ours_median / np.median(speed[name].wall) >= 130) if name.startswith('nltk') else {}
        rows.append(Row(measure, name, speed[name], 'tokens/s', ours=ours_median, **wanted))
    return rows


def _count_more(name, token, starts, config, rounds):
    "A larger corpus, against sorting alone"
    found = {}
    def ours(): found['rows'] = len(count_orders(token, starts, config)[0][1])
    speed = _speeds(in_turns({'datatools': ours, 'numpy sort': lambda: _sorted_keys(token, starts, config)}, rounds), len(token))
    median = float(np.median(speed['datatools'].wall))
    wanted = dict(target='≥ 10 M, stretch 18 M', met=median >= 10e6) if 'over and over' in name else {}
    measure = f'counting, {name}, {len(token):,} tokens ({found["rows"]:,} distinct 4-grams)'
    return [Row(measure, 'datatools', speed['datatools'], 'tokens/s', **wanted), Row(measure, 'numpy sort', speed['numpy sort'], 'tokens/s', ours=median)]


# ---------------------------------------------------------------- files

def files(corpus, quick):
    config, paths = GrooveConfig(min_bytes=0, min_notes=1), corpus.files[::8] if quick else corpus.files
    found = {}

    def ours():
        store = MemoryStore(lambda name: table_layout(config, name))
        totals = count_files([(path, False) for path in paths], config, None, False, store).totals
        found['datatools'] = totals['onsets'] + totals['unmapped'] + totals['doubled']
        for name in store.names(): next(store.blocks(name))  # sorted tables, as a model has them

    def with_mido():
        onsets = 0
        for path in paths:
            for track in mido.MidiFile(path).tracks:
                tick, notes = 0, []
                for message in track:
                    tick += message.time
                    if message.type == 'note_on' and message.channel == 9 and message.velocity: notes.append((tick, message.note, message.velocity))
                onsets += len(notes)
        found['mido'] = onsets

    def with_symusic():
        onsets = 0
        for path in paths:
            for track in symusic.Score(path).tracks:
                if track.is_drum: onsets += len(track.notes.numpy()['time'])
        found['symusic'] = onsets

    ours()
    with_symusic()
    speed = _speeds(in_turns({'datatools, counted': ours, 'symusic, read only': with_symusic, 'mido, read only': (with_mido, 3)}, 3 if quick else 9), len(paths))
    if found['datatools'] != found['mido']: raise SystemExit(f'files: the contestants find different numbers of onsets: {found}')
    median, measure = float(np.median(speed['datatools, counted'].wall)), f'files, {len(paths):,} real files of order 8 with feel and tempo, {found["datatools"]:,} onsets'
    slow = float(np.median(speed['mido, read only'].wall))
    return [Row(measure, 'datatools, counted', speed['datatools, counted'], 'files/s', target='≥ 8,000', met=median >= 8000),
        Row(measure, 'symusic, read only', speed['symusic, read only'], 'files/s', ours=median),
        Row(measure, 'mido, read only', speed['mido, read only'], 'files/s', ours=median, target='≥ 34x', met=median >= 34 * slow, note='the targets were set where mido reads 233 files/s')]


# ---------------------------------------------------------------- bits per onset

@njit
def plain_scores(trie, token, starts, start_token):
    "log10 of every token by the experts, no token excluded"
    path, out = np.empty(64, np.int64), np.empty(len(token))
    for file in range(len(starts) - 1):
        for i in range(starts[file], starts[file + 1]): out[i] = np.log10(forecast(trie, token, starts[file], i, 0, start_token, np.int64(-1), np.int64(token[i]), path))
    return out


def bits(corpus, quick):
    "Held-out bits per onset, ours through the command line"
    rows, place = [], Path(tempfile.mkdtemp(prefix='groove-bits-'))
    try:
        for name in ('train', 'test'): (place / f'{name}.txt').write_text('\n'.join(corpus.split[name]))
        for least in (800, 0): rows += _bits_with(corpus, place, least, quick)
    finally: shutil.rmtree(place)
    return rows


def _bits_with(corpus, place, least, quick):
    model_file = place / f'{least}.model'
    command('train', '--from-filelist', place / 'train.txt', '-o', model_file, '--drum-map', 'pitch', '--order', 8, '--min-bytes', least, '--json', '--no-progress', '--log-every', 0)
    figures = command('eval', model_file, '--from-filelist', place / 'test.txt', '--json', '--no-progress')
    model, test_config = GrooveModel.load(model_file), GrooveConfig(8, 'pitch', min_bytes=0, min_notes=1)
    performances = corpus.events(corpus.split['test'], test_config)
    token, starts = joined(performances)
    position = np.concatenate([events.position for events in performances])
    vocabulary, classes = test_config.vocabulary, test_config.classes
    if figures['onsets'] != len(token): raise SystemExit(f'bits: eval saw {figures["onsets"]} onsets, the benchmark {len(token)}')
    training = corpus.events(corpus.split['train'], model.config)
    measure = f'bits per onset, test split ({len(token):,} onsets), pitches, order 8, --min-bytes {least}: {len(training)} training files'
    rows = [Row(measure, 'datatools eval', [figures['bits_per_onset']], 'bits', target='≤ 3.11', met=figures['bits_per_onset'] <= 3.11),
        Row(measure, 'impossible', [100 * figures['impossible_share']], '%', target='0 %', met=figures['impossible_share'] == 0)]
    tries = {name: build_trie(*model.table(name), table_layout(model.config, name), vocabulary, placed=name == 'position') for name in ('ngram', 'position')}
    variants = {'  n-grams alone': (tries['ngram'], False), '  n-grams with position alone': (tries['position'], False), '  both': (model.experts(), False), '  n-grams, recall': (tries['ngram'], True)}
    for name, (trie, recall) in variants.items():
        rows.append(Row(measure, name, [-score_tokens(trie, token, position, starts, vocabulary, classes, recall).mean()], 'bits'))
    plain = plain_scores(tries['ngram'], token, starts, vocabulary)
    rows.append(Row(measure, '  n-grams alone, order of simultaneous hits ignored', [-plain.mean() / np.log10(2)], 'bits'))
    rows += _bits_kenlm(measure, place, model, training, token, starts, plain, quick)
    return rows + (_bits_nltk(measure, training, token, starts, quick) if find_spec('nltk') else [])


def find_lmplz():
    "Path of KenLM's lmplz, or None"
    beside = Path(sys.executable).parent / 'lmplz'
    return os.environ.get('KENLM_LMPLZ') or (str(beside) if beside.exists() else shutil.which('lmplz'))


def kenlm_scores(arpa, words, token, starts):
    "log10 of every token, and whether it is an unknown word, by KenLM's reading of an ARPA file"
    import kenlm
    model, out = kenlm.Model(str(arpa)), []
    for a, b in zip(starts, starts[1:]): out += [(score, unknown) for score, _, unknown in model.full_scores(' '.join(words[each] for each in token[a:b]), bos=True, eos=False)]
    scores, unknown = zip(*out)
    return np.array(scores), np.array(unknown)


def _bits_kenlm(measure, place, model, training, token, starts, plain, quick):
    "KenLM's own estimate on the same tokens, and its reading of ours"
    if not find_spec('kenlm'): return say('bits: the Python module kenlm is not installed, see benchmarks/build_kenlm.sh') or []
    words, rows, lmplz = token_words(model.config), [], find_lmplz()
    write_arpa(model, place / 'ours.arpa')
    scores, _ = kenlm_scores(place / 'ours.arpa', words, token, starts)
    apart = float(np.abs(scores - plain).max())
    rows.append(Row(measure, '  n-grams alone, exported, scored by KenLM', [-scores.mean() / np.log10(2)], 'bits', target='same', met=apart < 1e-4, note=f'apart by {apart:.1g} in log10 at most'))
    if not lmplz: return say('bits: no lmplz on PATH or in KENLM_LMPLZ, see benchmarks/build_kenlm.sh') or rows
    text = '\n'.join(' '.join(words[each] for each in events.token) for events in training) + '\n'
    done = subprocess.run([lmplz, '-o', '8', '--discount_fallback', '--vocab_pad', str(model.config.vocabulary + 3), '-S', '1G', '-T', str(place)],
        input=text.encode(), stdout=open(place / 'kenlm.arpa', 'wb'), stderr=subprocess.PIPE)
    if done.returncode: return say(f'bits: lmplz failed: {done.stderr.decode()[-500:]}') or rows
    scores, unknown = kenlm_scores(place / 'kenlm.arpa', words, token, starts)
    return rows + [Row(measure, 'KenLM lmplz -o 8', [-scores.mean() / np.log10(2)], 'bits', note=f'{unknown.sum()} tokens never seen, each given one share of <unk>')]


def _bits_nltk(measure, training, token, starts, quick):
    "NLTK's models of order 4: what it can do in reasonable time"
    from nltk.lm import MLE, Laplace, Lidstone
    from nltk.lm.preprocessing import padded_everygram_pipeline
    sentences, rows = [list(map(str, events.token.tolist())) for events in training], []
    alphabet = sorted(set(map(str, token.tolist())))
    for name, model in (('nltk MLE(4)', MLE(4)), ('nltk Laplace(4)', Laplace(4)), ('nltk Lidstone(0.01, 4)', Lidstone(0.01, 4))):
        grams, vocabulary = padded_everygram_pipeline(4, sentences)
        model.fit(grams, [*vocabulary, *alphabet])
        scores = []
        for a, b in zip(starts, starts[1:]):
            line = ['<s>'] * 3 + list(map(str, token[a:b].tolist()))
            scores += [model.logscore(line[i], line[i - 3:i]) for i in range(3, len(line))]
        impossible = np.isinf(scores).mean()
        rows.append(Row(measure, name, [-np.mean(scores)], 'bits', note=f'{impossible:.1%} impossible' if impossible else ''))
    return rows


# ---------------------------------------------------------------- sampling

def sampling(corpus, quick):
    "Onsets a second, and how many hits are simultaneous"
    rows = []
    for drum_map, least in (('9', 1e6), ('pitch', 1e6)):
        config = GrooveConfig(8, drum_map)
        model = GrooveModel(config).fit([path for path in corpus.split['train'] if os.path.getsize(path) >= config.min_bytes])
        token, _ = joined(corpus.events(corpus.split['train'], config))
        real = 100 * float((token < config.classes).mean())
        for bars, n in ((4, 5000), (16, 1250)):
            n = n // 5 if quick else n
            found = {}
            def ours(): found['grooves'] = model.generate(bars, n, seed=len(found))
            ours()
            seconds = in_turns({'datatools': ours}, 3 if quick else 7)['datatools']
            amount = len(found['grooves'].token)
            measure = f'sampling, {drum_map} drums, order 8, {n:,} grooves of {bars} bars, {amount:,} onsets with velocity and micro-timing'
            speed = seconds.rates(amount)
            rows.append(Row(measure, 'datatools', speed, 'onsets/s', target='≥ 1 M', met=np.median(speed.wall) >= least))
            share = 100 * float((found['grooves'].token < config.classes).mean())
            rows.append(Row(measure, 'simultaneous hits', [share], '%', target=f'{real:.1f} ± 3 % as in training', met=abs(share - real) <= 3))
    return rows + _sample_nltk(corpus, quick, rows[0])


def _sample_nltk(corpus, quick, ours):
    "NLTK's generate, of order 4 and one onset at a time"
    if not find_spec('nltk'): return []
    from nltk.lm import MLE
    from nltk.lm.preprocessing import padded_everygram_pipeline
    performances = corpus.events(corpus.split['train'][:100] if quick else corpus.split['train'], GrooveConfig())
    model, amount = MLE(4), 1000
    model.fit(*padded_everygram_pipeline(4, [list(map(str, events.token.tolist())) for events in performances]))
    seconds = in_turns({'nltk': lambda: model.generate(amount, random_seed=1)}, 2)['nltk']
    return [Row('sampling, order 4, tokens alone', 'nltk MLE(4).generate', seconds.rates(amount), 'onsets/s', ours=ours.median)]


# ---------------------------------------------------------------- memory

def midi_bytes(tick, pitch, velocity, starts):
    "Type-0 MIDI files of 480 ticks a beat, one per groove: onsets sorted by tick, every note one tick long"
    groove = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    owner, time_, is_on = np.tile(groove, 2), np.concatenate([tick, tick + 1]), np.repeat([1, 0], len(tick))
    order = np.argsort((owner * (int(time_.max()) + 1) + time_) * 2 + is_on, kind='stable')
    owner, time_ = owner[order], time_[order]
    delta = np.diff(time_, prepend=0)
    delta[np.searchsorted(owner, np.arange(len(starts) - 1))] = time_[np.searchsorted(owner, np.arange(len(starts) - 1))]
    delta = np.minimum(delta, 128 * 128 - 1)
    long = delta > 127
    at = np.concatenate([[0], np.cumsum(3 + long)])
    data = np.zeros(at[-1], np.uint8)
    data[at[:-1][long]] = 128 + delta[long] // 128
    data[at[:-1] + long] = delta % 128
    data[at[:-1] + long + 1] = np.tile(pitch, 2)[order]
    data[at[:-1] + long + 2] = np.concatenate([velocity, np.zeros_like(velocity)])[order]
    for begin, end in zip(at[2 * starts[:-1]], at[2 * starts[1:]]):
        body = data[begin:end].tobytes()
        body = body[:1 + (body[0] > 127)] + b'\x99' + body[1 + (body[0] > 127):] + b'\x00\xff\x2f\x00'  # running status from the first event on
        yield b'MThd\x00\x00\x00\x06\x00\x00\x00\x01\x01\xe0MTrk' + len(body).to_bytes(4, 'big') + body


def write_endless(model, folder, onsets, bars=512, at_once=64):
    "Files of about 10,000 onsets, drawn from the model with all novelty, until there are so many onsets"
    folder.mkdir()
    written, files = 0, 0
    while written < onsets:
        grooves = model.generate(bars, at_once, seed=files, novelty=1.0, recall=False)
        groove = np.repeat(np.arange(at_once), np.diff(grooves.starts))
        order = np.lexsort((grooves.tick, groove))
        for data in midi_bytes(grooves.tick[order], grooves.pitch[order], grooves.velocity[order], grooves.starts):
            (folder / f'{files:06d}.mid').write_bytes(data)
            files += 1
        written += len(grooves.token)
        if files % (at_once * 32) == 0: say(f'memory: {written / 1e6:.0f} million onsets written')
    return written / files


def watched(arguments, folder):
    "Run a command: (its output as JSON, seconds, high-water mark of its resident memory in bytes, of the folder's size)"
    start, resident, disk = time.perf_counter(), 0, 0
    with tempfile.TemporaryFile('w+') as out, subprocess.Popen([sys.executable, '-m', 'datatools.groove', *map(str, arguments)], cwd=ROOT, stdout=out) as process:
        while process.poll() is None:
            try: marks = [int(line.split()[1]) * 1024 for line in Path(f'/proc/{process.pid}/status').read_text().splitlines() if line.startswith('VmHWM')]
            except OSError: marks = []
            resident, disk = max([resident, *marks]), max(disk, size_of(folder))
            time.sleep(0.1)
        if process.returncode: raise SystemExit(f'groove {" ".join(map(str, arguments))} failed')
        out.seek(0)
        return json.loads(out.read()), time.perf_counter() - start, resident, disk


def size_of(folder):
    "Bytes of all files below a folder, some of which may vanish"
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try: total += os.stat(os.path.join(place, name)).st_blocks * 512
            except FileNotFoundError: continue
    return total


def memory(corpus, quick):
    "Peak resident memory over corpora of growing size"
    sizes = [2_000_000, 8_000_000] if quick else [12_500_000, 50_000_000, 200_000_000]
    place, rows, marks = Path(tempfile.mkdtemp(prefix='groove-memory-')), [], []
    try:
        free = shutil.disk_usage(place).free
        sizes = [size for size in sizes if size * 150 < free] or say(f'memory: {free >> 30} GiB free in {place} are too little') or []
        if not sizes: return []
        per_file = write_endless(GrooveModel(GrooveConfig()).fit(corpus.split['train']), place / 'files', sizes[-1])
        for size in sizes:
            work = place / 'work'
            say(f'memory: training on {size / 1e6:g} million onsets')
            facts, seconds, resident, disk = watched(['train', place / 'files', '-o', work / 'a.model', '--train-mode', 'stream', '--store', 'memmap', '--max-ram-mb', 384,
                '--max-files', round(size / per_file), '--mem-stats', '--json', '--no-progress', '--log-every', 0], work)
            distinct = GrooveModel.load(work / 'a.model').info()['rows']['ngram']
            shutil.rmtree(work)
            resident = max(resident, facts['peak_rss_bytes'])
            marks.append(resident)
            measure = f'memory, {facts["onsets"] / 1e6:.1f} M onsets in {facts["kept"]:,} files, {distinct / 1e6:.1f} M distinct 8-grams, --store memmap --max-ram-mb 384'
            rows += [Row(measure, 'peak resident memory', [resident / 2**20], 'MiB', target='≤ 512', met=resident <= 512 << 20),
                Row(measure, 'speed, start and end included', [facts['onsets'] / seconds], 'onsets/s', note=f'{seconds:.0f} s'), Row(measure, 'peak disk', [disk / 2**20], 'MiB')]
        flat = {} if quick else dict(target='flat: ≤ 1.2', met=marks[-1] <= 1.2 * marks[0])  # small corpora do not fill the memory they may use
        rows.append(Row(rows[-1].measure, 'peak memory, largest corpus : smallest', [marks[-1] / marks[0]], **flat))
    finally: shutil.rmtree(place)
    return rows


# ---------------------------------------------------------------- kills and merges

def apart(work, patience=None):
    "Do `work` in a forked process, killed after `patience` seconds if it takes longer; whether it ended by itself"
    process = multiprocessing.get_context('fork').Process(target=work)
    process.start()
    process.join(patience)
    if process.is_alive(): os.kill(process.pid, signal.SIGKILL)
    process.join()
    if process.exitcode not in (0, -signal.SIGKILL): raise SystemExit(f'training failed with exit code {process.exitcode}')
    return process.exitcode == 0


def digest(model): return hashlib.sha256(model.read_bytes() + Path(f'{model}.skipped.jsonl').read_bytes()).hexdigest()


def kills(corpus, quick):
    "Killed, resumed, merged: how many end in the same bytes"
    place, chance, rows = Path(tempfile.mkdtemp(prefix='groove-kills-')), random.Random(1), []
    config, files = GrooveConfig(order=4), FileList(corpus.files)
    try:
        train_model(files, place / 'whole.model', config, Run(show_progress=False))
        whole = digest(place / 'whole.model')
        for store in ('memory', 'memmap', 'sqlite'): rows.append(_killed(store, files, config, place, whole, chance, 4 if quick else 25))
        rows.append(_merged(files, config, place, whole, chance, 3 if quick else 12))
    finally: shutil.rmtree(place)
    return rows


def _killed(store, files, config, place, whole, chance, times):
    "One to three kills per run, anywhere from its first file to the last byte of its model"
    same = killed = 0
    whole_seconds = 0.0
    for n in range(times + 1):
        work = place / f'{store}-{n}'
        output = work / 'a.model'
        def job(): train_model(files, output, config, Run(store=store, memmap_dir=work / 'counts', db_path=work / 'counts.sqlite', save_every=100, show_progress=False, resume=True))
        start = time.perf_counter()
        for _ in range(chance.randint(1, 3) if n else 0):
            if apart(job, chance.uniform(0, whole_seconds)): break
            killed += 1
        apart(job)
        if n == 0: whole_seconds = time.perf_counter() - start  # the first is not killed
        else: same += digest(output) == whole
        shutil.rmtree(work)
    return Row('SIGKILL at random moments, then --resume: same sha256 as the uninterrupted run', f'{store} store', [same], f'of {times}', target=f'{times}', met=same == times, note=f'{killed} kills in runs of {whole_seconds:.1f} s')


def _merged(files, config, place, whole, chance, times):
    "Random numbers of shards, merged in random groups"
    same = 0
    for n in range(times):
        work, shards = place / f'merge-{n}', chance.randint(2, 9)
        parts = [work / f'{k}.model' for k in range(shards)]
        for k, part in enumerate(parts): train_model(files, part, config, Run(shard_index=k, num_shards=shards, show_progress=False))
        while len(parts) > 1:
            chance.shuffle(parts)
            group, parts = parts[:(size := chance.randint(2, min(4, len(parts))))], parts[size:]
            parts.append(work / f'{"-".join(part.stem for part in group)}.model')
            merge_files(group, parts[-1])
        same += digest(parts[0]) == whole
        shutil.rmtree(work)
    return Row('random shards, merged in random order and nesting: same sha256 as the single run', 'merge', [same], f'of {times}', target=f'{times}', met=same == times)


# ---------------------------------------------------------------- command line

MEASURES = dict(counting=counting, files=files, bits=bits, sampling=sampling, memory=memory, kills=kills)


def main():
    parser = argparse.ArgumentParser(prog='python -m benchmarks.groove', description=__doc__.partition('\n')[0], allow_abbrev=False)
    parser.add_argument('--quick', action='store_true', help='small corpora and few rounds')
    parser.add_argument('--only', action='append', choices=MEASURES, metavar='NAME', help=f'one of {", ".join(MEASURES)}; may be given several times')
    parser.add_argument('--data', default=DATA, type=Path, help='folder of the Groove MIDI Dataset, with info.csv')
    options = parser.parse_args()
    if not (options.data / 'info.csv').is_file(): raise SystemExit(f'no Groove MIDI Dataset in {options.data}: --data names its folder, the one with info.csv')
    facts, corpus, rows = machine(), Corpus(options.data), []
    say(f'{facts["cpu"]}, {facts["cores"]} cores, load {facts["load"]}')
    for name in options.only or MEASURES:
        say(name)
        rows += MEASURES[name](corpus, options.quick)
    show(rows, facts)
    save('groove', rows, facts)
    missed = [row for row in rows if row.met is False]
    print(f'\n{sum(row.met is True for row in rows)} targets met, {len(missed)} missed' + ''.join(f'\n  missed: {row.measure}: {row.who}, {row.target}' for row in missed))


if __name__ == '__main__': main()
