"""Odd, broken and mutated MIDI files, and what reading, writing and putting onsets on a grid promise for any input."""
import io
import sys
from fractions import Fraction
from math import ceil, floor
from pathlib import Path

import mido
import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies as st

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.fuzz_midi import Unreadable, differences, reference_read  # noqa: E402
from datatools.core import UsageError  # noqa: E402
from datatools.groove.events import DRUM_CLASSES, UNMAPPED, GrooveConfig, detokenise, drum_lookup, tokenise  # noqa: E402
from datatools.groove.midi import DrumPart, MidiFault, read_drums, write_drums  # noqa: E402

# What each odd file must give, found from its bytes: the fault, or how many note-ons with a velocity channel 10 has.
JAZZ_SOFT = {
    183: 'all-gm-percussion',  # 61 keys from 27 on, three times each
    4: 'control-00-20-bank-select sysex-gs-40-1x-15-drum-part-change',  # channel 10 as a melody: still its note-ons
    'empty': 'empty-file',
    'not_midi': 'not-a-midi-file syx-7e-06-01-id-request',
    'unsupported_format': '2-tracks-type-2',
    'truncated': 'corrupt-file-missing-byte',  # the chunk announces 246 bytes, 245 are left
    'illegal_status': ' '.join(f'illegal-message-{kind}' for kind in ('all', 'f1-xx', 'f2-xx-xx', 'f3-xx', *(f'f{n:x}' for n in (4, 5, 6, 8, 9, 10, 11, 12, 13, 14)))),
    'no_drums': '2-tracks-type-0 2-tracks-type-1 all-gm-sounds all-gm2-sounds all-gs-sounds all-microsoft-gs-wavetable-synth-sounds all-xg-sounds '
        'c-major-scale control-40-damper control-41-portamento control-54-portamento-control control-7c-omni-mode-off control-7d-omni-mode-on '
        'control-7e-mono-mode-on control-7f-poly-mode-on corrupt-file-extra-byte empty gm2-doggy-78-00-38-4c gm2-doggy-79-01-7b gs-doggy-01-00-7b '
        'karaoke-kar multichannel-chords-0 multichannel-chords-1 multichannel-chords-2 multichannel-chords-3 non-midi-track note-on-velocity '
        'rpn-00-00-pitch-bend-range rpn-00-01-fine-tuning rpn-00-02-coarse-tuning rpn-00-05-modulation-depth-range running-status-metaevent '
        'running-status-sysex silence-all-notes-off silence-end-of-track silence-text-metaevent smpte-offset sysex-7e-06-01-id-request '
        'sysex-7e-09-01-gm1-enable sysex-7e-09-02-gm-disable sysex-7e-09-03-gm2-enable sysex-7f-04-03-master-fine-tuning '
        'sysex-7f-04-04-master-coarse-tuning sysex-7x-08-0x-scale-tuning sysex-gs-40-1x-4x-scale-tuning track-length vlq-2-byte vlq-3-byte '
        'vlq-4-byte xg-doggy-40-00-30 xg-doggy-7e-00-00-54'}
SYNTHETIC = {
    1: 'hdrlen_10 keysig_bad no_noteoff text_latin1 trailing_junk zero_len_note',
    2: 'overlap_same_pitch',
    'truncated': 'chunklen_huge meta_badlen ntrks65535 sysex_unterminated',  # each announces more than there is
    'bad_running_status': 'data_byte_first',
    'division_zero': 'div0',
    'unsupported_format': 'fmt2 fmt7',
    'not_midi': 'leading_junk',
    'no_end_of_track': 'noEOT',
    'no_drums': 'noteoff_only',
    'no_tracks': 'ntrks0',
    'riff_container': 'riff_rmi',
    'smpte_division': 'smpte_e728',
    'tick_overflow': 'sum_overflow_int32',
    'tempo_zero': 'tempo0',
    'bad_time_signature': 'ts_den_pow255 ts_num0',
    'data_byte_above_127': 'vel_gt127',
    'bad_delta_time': 'vlq5'}
ODD = {f'{folder}/{prefix}{name}': outcome for folder, prefix, table in (('jazz_soft', 'test-', JAZZ_SOFT), ('synthetic', '', SYNTHETIC))
       for outcome, names in table.items() for name in names.split()}


def outcome_of(data):
    "The fault's name, or the number of onsets"
    try: return len(read_drums(data).tick)
    except MidiFault as error: return error.fault.name


def test_the_table_names_every_odd_file(shared_data):
    found = {path.relative_to(shared_data/'midi_odd').with_suffix('').as_posix() for path in (shared_data/'midi_odd').glob('*/*.*') if path.suffix != '.md'}
    assert found == set(ODD)


@pytest.mark.parametrize('name', sorted(ODD))
def test_odd_file(shared_data, name):
    path, = [path for path in (shared_data/'midi_odd').glob(f'{name}.*')]
    data = path.read_bytes()
    assert outcome_of(data) == ODD[name]
    if isinstance(ODD[name], int): assert list(differences(reference_read(data), read_drums(data))) == []
    else:
        try: assert reference_read(data).onsets == [] and ODD[name] == 'no_drums'
        except Unreadable: pass
    assert path.read_bytes() == data


def test_all_real_performances_are_read_whole(shared_data):
    paths = sorted((shared_data/'groove_midi').rglob('*.mid'))
    parts = [read_drums(path.read_bytes()) for path in paths]
    assert (len(paths), sum(len(part.tick) for part in parts)) == (1150, 446_312)
    for path, part in list(zip(paths, parts))[::23]: assert list(differences(reference_read(path.read_bytes()), part)) == [], path


def test_mutants_neither_crash_nor_hang_nor_are_half_read(python, tmp_path):
    "About 2,000 mutants in a watched process; `python -m benchmarks.fuzz_midi` makes 30,000"
    done = python('-m', 'benchmarks.fuzz_midi', '--mutants', 2000, '--save', tmp_path)
    assert done.returncode == 0, f'{done.stdout}\n{done.stderr[-2000:]}'
    outcomes = {name: int(count.replace(',', '')) for count, name in (line.split(maxsplit=1) for line in done.stdout.splitlines() if line.startswith(' '))}
    assert outcomes['read'] > 200 and len(outcomes) > 12, 'the mutants must reach deep and wide'


@pytest.mark.drill
def test_many_mutants(python, tmp_path):
    done = python('-m', 'benchmarks.fuzz_midi', '--mutants', 40_000, '--seed', 1, '--most-bytes', 20_000, '--save', tmp_path, timeout=1800)
    assert done.returncode == 0, f'{done.stdout}\n{done.stderr[-2000:]}'


def header(form=1, tracks=1, division=480): return b'MThd' + b''.join(n.to_bytes(size, 'big') for n, size in ((6, 4), (form, 2), (tracks, 2), (division, 2)))
def track(text, end='00 ff 2f 00'):
    body = bytes.fromhex(text + end)
    return b'MTrk' + len(body).to_bytes(4, 'big') + body


@pytest.mark.parametrize('events, onsets', [
    ('00 f7 02 f3 01 10 99 24 40 10 24 00', [(16, 36, 64)]),                           # an escape takes no time
    ('00 f7 00 10 99 24 40 10 89 24 00', [(16, 36, 64)]),
    ('00 99 24 40 00 f7 02 f3 01 10 99 24 00 10 24 40 10 24 00', [(0, 36, 64), (32, 36, 64)]),
    ('00 99 24 40 00 f0 03 43 12 00 10 f7 03 43 12 f7 10 99 26 41', [(0, 36, 64), (32, 38, 65)]),  # a system exclusive in two packets
    ('00 99 24 40 10 ff 01 00 10 26 41', [(0, 36, 64), (32, 38, 65)]),                 # running status goes on after a meta event …
    ('00 99 24 40 10 f0 02 7e f7 10 26 41 10 24 00', [(0, 36, 64), (32, 38, 65)]),     # … and after a system exclusive
    ('00 99 24 40 00 24 41 00 24 42', [(0, 36, 64), (0, 36, 65), (0, 36, 66)]),        # three note-ons, no note-off
    ('00 ff 59 02 7f 05 00 99 24 40', [(0, 36, 64)]),                                  # a key that does not exist
    ('80 80 00 99 24 40 80 80 80 10 26 00 81 00 24 7f', [(0, 36, 64), (144, 36, 127)]), # numbers longer than they need be
    ('00 c9 05 00 d9 40 00 b9 7b 00 00 e9 00 40 00 a9 24 10 00 99 24 01', [(0, 36, 1)]),
    ('00 98 24 40 00 9a 24 40 08 99 24 40', [(8, 36, 64)])])
def test_events_that_readers_get_wrong(events, onsets):
    data = header() + track(events)
    assert reference_read(data).onsets == onsets
    part = read_drums(data)
    assert sorted(zip(part.tick.tolist(), part.pitch.tolist(), part.velocity.tolist())) == onsets


@pytest.mark.parametrize('data', [
    header(0, 1)[:7] + b'\x0a' + header(0, 1)[8:] + bytes(4) + track('00 99 24 40'),   # a header of ten bytes
    header(1, 2) + track('00 99 24 40') + b'Junk\0\0\0\3abc' + track('10 99 24 40'),    # a foreign chunk between tracks
    header(1, 1) + track('00 99 24 40 30 26 00') + b'junk'], ids=['long header', 'foreign chunk', 'trailing bytes'])
@pytest.mark.parametrize('note_off', [b'', b'\x20\x89\x24\x00'], ids=['open note', 'closed note'])
def test_chunks_that_readers_get_wrong(data, note_off):
    if note_off:
        at = data.index(b'\x00\x99\x24\x40') + 4
        chunk = data.rindex(b'MTrk', 0, at)
        data = data[:chunk + 4] + (int.from_bytes(data[chunk + 4:chunk + 8], 'big') + 4).to_bytes(4, 'big') + data[chunk + 8:at] + note_off + data[at:]
    assert list(differences(reference_read(data), read_drums(data))) == []


def test_the_later_of_two_time_signatures_at_one_tick_holds():
    three_four = mido.MetaMessage('time_signature', numerator=3, denominator=4)
    for notes in ('00 99 24 40 10 24 00', '00 99 24 40'):  # with and without a note-off: each parser reads one of them
        data = header() + track(f'00 ff 58 04 04 02 18 08 00 {three_four.bin().hex()} {notes}')
        assert read_drums(data).time_signatures[-1].tolist() == [0, 3, 4]


hits = st.tuples(st.one_of(st.integers(0, 5000), st.integers(0, 2**28 - 1)), st.integers(0, 127), st.integers(1, 127))
signatures = st.lists(st.tuples(st.integers(0, 20000), st.integers(1, 255), st.sampled_from([1, 2, 4, 8, 16, 32, 64])), max_size=3, unique_by=lambda row: row[0])


def drum_part(rows, ticks_per_beat=480, changes=(), tempo=120.0):
    "A `DrumPart` of (tick, key, velocity) rows"
    tick, pitch, velocity = np.array(rows, np.int64).reshape(-1, 3).T
    return DrumPart(tick.copy(), pitch.astype(np.uint8), velocity.astype(np.uint8), ticks_per_beat, np.array(changes, np.int64).reshape(-1, 3), tempo)


@settings(max_examples=150, deadline=None)
@given(st.lists(hits, min_size=1, max_size=30, unique_by=lambda hit: hit[:2]), st.integers(1, 32767), signatures, st.integers(1_000, 2**24 - 1))
def test_what_is_written_is_read_back(rows, ticks_per_beat, changes, microseconds):
    part = drum_part(sorted(rows, key=lambda hit: hit[0]), ticks_per_beat, sorted(changes), 60e6 / microseconds)
    assume(np.diff(part.tick, prepend=0).max() < 2**28 - 5000)
    out = io.BytesIO()
    write_drums(out, part)
    back = read_drums(out.getvalue())
    assert list(differences(reference_read(out.getvalue()), back)) == []
    assert sorted(zip(back.tick.tolist(), back.pitch.tolist(), back.velocity.tolist())) == sorted(rows)
    assert (back.ticks_per_beat, back.time_signatures.tolist()) == (ticks_per_beat, [list(row) for row in sorted(changes)])
    assert back.tempo == pytest.approx(part.tempo, rel=1e-5)
    again = io.BytesIO()
    write_drums(again, part)
    assert again.getvalue() == out.getvalue()


HIT = (0, 36, 64)
IMPOSSIBLE = {
    'not sorted': dict(rows=[(10, 36, 64), (5, 36, 64)]), 'before the start': dict(rows=[(-1, 36, 64)]), 'velocity 0': dict(rows=[(0, 36, 0)]),
    'velocity 128': dict(rows=[(0, 36, 128)]), 'key 200': dict(rows=[(0, 200, 64)]), 'one drum twice': dict(rows=[HIT, (0, 36, 70)]),
    'a gap of 28 bits': dict(rows=[(2**28, 36, 64)]), 'beyond 31 bits': dict(rows=[(n * 2**27, 36, 64) for n in range(17)]),
    'no ticks': dict(rows=[HIT], ticks_per_beat=0), 'too many ticks': dict(rows=[HIT], ticks_per_beat=2**15),
    'a beat of 20 seconds': dict(rows=[HIT], tempo=3.0), 'no tempo': dict(rows=[HIT], tempo=0.0), 'too fast': dict(rows=[HIT], tempo=1e9),
    'a third note': dict(rows=[HIT], changes=[(0, 4, 3)]), 'no beats': dict(rows=[HIT], changes=[(0, 0, 4)]), '256 beats': dict(rows=[HIT], changes=[(0, 256, 4)]),
    'a 128th note': dict(rows=[HIT], changes=[(0, 4, 128)]), 'changes not sorted': dict(rows=[HIT], changes=[(9, 4, 4), (0, 3, 4)])}


@pytest.mark.parametrize('what', IMPOSSIBLE)
def test_what_midi_cannot_hold_is_refused(tmp_path, what):
    with pytest.raises(UsageError): write_drums(tmp_path/'out.mid', drum_part(**IMPOSSIBLE[what]))
    assert list(tmp_path.iterdir()) == []


# Onsets on the grid. The oracle works with fractions; a bar of n/d is 4n/d beats, and steps are rounded half up.

def placed(rows, ticks_per_beat, changes, config):
    "(step, position, length of the bar in steps as a fraction) of every tick"
    for tick, _, _ in rows:
        start, origin, numerator, denominator = 0, 0, config.beats_per_bar, 4
        for at, top, bottom in changes:
            if at > tick: break
            origin += floor(Fraction((at - start) * config.resolution, ticks_per_beat) + Fraction(1, 2))
            start, numerator, denominator = at, top, bottom
        step = floor(Fraction((tick - start) * config.resolution, ticks_per_beat) + Fraction(1, 2))
        length = Fraction(4 * numerator * config.resolution, denominator)
        yield origin + step, step - ceil(step // length * length), length


configs = st.builds(GrooveConfig, order=st.just(3), drum_map=st.sampled_from(['9', 'pitch']), resolution=st.integers(1, 24), beats_per_bar=st.integers(1, 12))
loose = st.tuples(st.integers(0, 30_000), st.integers(0, 127), st.integers(1, 127))


@settings(max_examples=200, deadline=None)
@given(st.lists(loose, min_size=1, max_size=40), st.integers(1, 1000), signatures, configs, st.randoms(use_true_random=False))
def test_tokens_of_any_performance(rows, ticks_per_beat, changes, config, random):
    changes = sorted(changes)
    events = tokenise(drum_part(sorted(rows, key=lambda hit: hit[0]), ticks_per_beat, changes), config)
    to_class, _ = drum_lookup(config.drum_map)
    kept = {}
    for row, (step, position, length) in zip(sorted(rows, key=lambda hit: hit[0]), placed(sorted(rows, key=lambda hit: hit[0]), ticks_per_beat, changes, config)):
        drum = int(to_class[row[1]])
        if drum != UNMAPPED and (step, drum) not in kept or drum != UNMAPPED and kept[step, drum][2] < row[2]: kept[step, drum] = (*row, position, length)
    wanted = sorted(kept)
    gap, drum = np.divmod(events.token.astype(int), config.classes)
    assert [int(each) for each in drum] == [each for _, each in wanted]
    assert events.position.tolist() == [min(kept[key][3], 254) for key in wanted]
    assert events.velocity.tolist() == [kept[key][2] // 4 for key in wanted]
    assert all(int(token) < config.vocabulary for token in events.token) and (events.micro < 32).all()
    assert all(0 <= kept[key][3] < kept[key][4] + 1 for key in wanted)
    for i, key in enumerate(wanted):  # a gap that is too long loses whole bars, so the position stays true
        real, bar = (key[0] - wanted[i - 1][0]) if i else kept[key][3], ceil(kept[key][4])
        if real <= config.longest_gap: assert gap[i] == real
        elif bar <= config.longest_gap: assert config.longest_gap - bar < gap[i] <= config.longest_gap and (real - gap[i]) % bar == 0
        else: assert 0 < gap[i] <= config.longest_gap
    assert (events.bars > 0) == (len(wanted) > 0)
    shuffled = list(rows)
    random.shuffle(shuffled)
    others = tokenise(drum_part(shuffled, ticks_per_beat, changes), config)
    assert all(np.array_equal(a, b) for a, b in zip(events, others)), 'the order in the file must not matter'


@settings(max_examples=150, deadline=None)
@given(configs, st.integers(1, 40), st.lists(st.tuples(st.integers(0, 30), st.integers(0, 8)), min_size=1, max_size=40), st.integers(0, 1000), st.booleans())
def test_a_performance_on_the_grid_comes_back(config, ticks_per_step, moves, first, stated):
    step = first % config.longest_gap + first // config.longest_gap * config.longest_gap
    hits = {(step := step + move % (config.longest_gap + 1), DRUM_CLASSES[drum][1]) for move, drum in moves}
    rows = [(step * ticks_per_step, key, 100) for step, key in sorted(hits)]
    changes = [(0, config.beats_per_bar, 4)] if stated else []
    events = tokenise(drum_part(rows, ticks_per_step * config.resolution, changes), config)
    steps, drums = detokenise(events.token, config)
    keys = drum_lookup(config.drum_map)[1][drums]
    origin = rows[0][0] // ticks_per_step // config.longest_gap * config.longest_gap
    assert sorted(zip((steps + origin).tolist(), keys.tolist())) == sorted(hits)
    assert (events.position == np.minimum(steps % config.longest_gap, 254)).all() and (events.micro == 16).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 8), st.integers(50, 200), st.integers(0, 2**32 - 1))
def test_many_tracks_one_after_the_other_are_one_performance(tracks, hits_each, seed):
    "Far from sorted input takes another way through the sort"
    rng, config = np.random.default_rng(seed), GrooveConfig()
    rows = [(int(tick), int(key), int(velocity)) for _ in range(tracks) for tick, key, velocity in
            zip(np.sort(rng.integers(0, 20_000, hits_each)), rng.integers(35, 60, hits_each), rng.integers(1, 128, hits_each))]
    one, other = tokenise(drum_part(rows), config), tokenise(drum_part(sorted(rows, key=lambda hit: hit[0])), config)
    assert all(np.array_equal(a, b) for a, b in zip(one, other))
