"""Parameter sets: there and back exactly, chance from the generator alone, every wrong file named with all that is wrong in it."""
import json
import math
import multiprocessing
import pickle
import re

import numpy as np
import pytest
import yaml
from hypothesis import given, settings, strategies as st

from datatools.core import DatatoolsError, FormatError, UsageError, config_hash, rng_for
from datatools.vst.kinds import Categorical, Continuous, Integer, Note, NoteTimes, Patch, Pitch, Velocity
from datatools.vst.params import ParamSpec, check_names, draft_spec, load_param_set, read_yaml, shipped_param_sets

raw = st.floats(0, 1)
words = st.text(st.characters(exclude_categories=['Cs']), min_size=1, max_size=12).filter(str.strip)


@st.composite
def ranges(draw, low, high):
    return sorted([draw(st.integers(low, high)), draw(st.integers(low, high))])


@st.composite
def synth_parameters(draw, name):
    kind = draw(st.sampled_from(['continuous', 'categorical', 'integer']))
    if kind == 'continuous':
        low, high = sorted([draw(raw), draw(raw)])
        return Continuous(name, low, high, draw(raw), draw(raw))
    if kind == 'integer':
        steps = draw(st.integers(2, 2000))
        low, high = draw(ranges(0, steps - 1))
        return Integer(name, low, high, steps)
    raws = draw(st.lists(raw, min_size=1, max_size=6, unique_by=lambda value: float(np.float32(value))))
    choices = st.one_of(words, st.integers(-9, 9), st.floats(-9, 9), st.booleans())
    values = draw(st.lists(choices, min_size=len(raws), max_size=len(raws), unique_by=str))
    weights = draw(st.none() | st.lists(st.floats(0, 1e9), min_size=len(raws), max_size=len(raws)).filter(sum))
    return Categorical(name, values, raws, weights, draw(st.sampled_from(['onehot', 'scalar'])))


@st.composite
def specs(draw):
    names = draw(st.lists(words, min_size=1, max_size=6, unique=True))
    seconds = draw(st.floats(0.001, 3600))
    note = [Pitch(*draw(ranges(0, 127))), NoteTimes(seconds, seconds * draw(raw))]
    if draw(st.booleans()): note.append(Velocity(*draw(ranges(1, 127))))
    return ParamSpec(draw(words), [draw(synth_parameters(f'{i} {name}')) for i, name in enumerate(names)], note)


seeds = st.integers(0, 2**32)


@settings(deadline=None)
@given(specs(), seeds, st.integers(1, 127))
def test_there_and_back_exactly(spec, seed, velocity):
    patch = spec.sample(rng_for(seed), velocity)
    vector = spec.encode(patch)
    assert vector.shape == (spec.encoded_length,) == (len(spec.encoded_names),) and vector.dtype == np.float32
    assert spec.decode(vector, velocity) == patch
    assert spec.encode(spec.decode(vector)).tobytes() == vector.tobytes()
    assert all(type(value) is float and 0 <= value <= 1 for value in patch.parameters.values())
    assert tuple(patch.parameters) == spec.names and [type(value) for value in patch.note] == [int, int, float, float]
    assert json.loads(json.dumps(patch)) == [patch.parameters, list(patch.note)]
    rounded = Patch({name: float(np.float32(value)) for name, value in patch.parameters.items()}, patch.note)
    assert spec.encode(rounded).tobytes() == vector.tobytes(), 'a plugin gives raw values back as float32'


@settings(deadline=None)
@given(specs(), seeds)
def test_draws_stay_in_their_range(spec, seed):
    rng = rng_for(seed)
    for _ in range(5):
        patch = spec.sample(rng)
        times = {p.kind: p for p in spec.note}['note_times']
        assert 0 <= patch.note.start <= patch.note.end <= times.maximum_seconds
        assert patch.note.end - patch.note.start >= times.minimum_length - 1e-6 * times.maximum_seconds
        for p in spec.parameters:
            value = patch.parameters[p.name]
            if p.kind == 'continuous': assert np.float32(p.minimum) <= value <= np.float32(p.maximum) or value == np.float32(p.constant)
            if p.kind == 'categorical': assert p.weights is None or p.weights[p.raw_values.index(value)] > 0
            if p.kind == 'integer': assert p.minimum <= round(value * (p.steps - 1)) <= p.maximum


@pytest.mark.parametrize('first, second', [(0.0, 0.0), (0.0, 1 - 2**-53), (1 - 2**-53, 1 - 2**-53), (0.5, 0.5)])
def test_the_ends_of_chance(first, second):
    "The least and the greatest number that a generator gives."
    for p in (Continuous('c', 0.1, 0.1), Continuous('c', 0.437545, 0.562455, 1), Categorical('k', [1, 2, 3], [0, 0.5, 1], [0, 1, 0]),
            Categorical('k', [1, 2, 3], [0, 0.5, 1], [1e-300, 0, 0]), Integer('i', 5, 2**20 - 1), Integer('i', 0, 0, 2), Pitch(0, 127),
            Velocity(5, 5), NoteTimes(3.7, 3.7), NoteTimes(1e-3, 0)):
        value = p.draw(first, second)
        vector = np.array(p.encode(value), np.float32)
        assert len(vector) == p.size and p.decode(vector) == value
        if p.kind == 'categorical' and p.weights[1]: assert value == 0.5


@settings(deadline=None)
@given(specs(), seeds)
def test_chance_comes_from_the_generator_alone(spec, seed):
    np.random.seed(1)
    rng = rng_for(seed)
    before = rng.bit_generator.state
    drawn = [spec.sample(rng) for _ in range(3)]
    np.random.seed(2)
    rng.bit_generator.state = before
    assert [spec.sample(rng) for _ in range(3)] == drawn


def test_a_change_of_one_parameter_leaves_the_others():
    spec = load_param_set('surge_full')
    other = list(spec.parameters)
    other[10] = Categorical(other[10].name, ['a', 'b'], [0, 1], encoding='scalar')
    changed = ParamSpec('changed', [*other, Continuous('one more')], [*spec.note, Velocity()])
    for i in range(20):
        one, two = spec.sample(rng_for(1, i)), changed.sample(rng_for(1, i))
        assert {name for name in spec.names if one.parameters[name] != two.parameters[name]} == {other[10].name}
        assert one.note._replace(velocity=0) == two.note._replace(velocity=0)


@settings(deadline=None, max_examples=60)
@given(spec=specs())
def test_yaml_and_json_there_and_back(tmp_path_factory, spec):
    path = tmp_path_factory.mktemp('yaml') / 'set.yaml'
    spec.to_yaml(path, 'a comment\nof two lines')
    again = ParamSpec.from_yaml(path)
    assert again == spec and again.encoded_names == spec.encoded_names and config_hash(again.to_dict()) == config_hash(spec.to_dict())
    assert ParamSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    assert yaml.safe_load(path.read_text(encoding='utf-8')) == spec.to_dict(), 'other readers of YAML see the same'
    assert pickle.loads(pickle.dumps(spec)) == spec


def draw_elsewhere(spec): return spec.encode(spec.sample(rng_for(5)))


def test_the_same_patch_in_a_fresh_process():
    spec = load_param_set('surge_simple')
    with multiprocessing.get_context('spawn').Pool(1) as pool: assert (pool.apply(draw_elsewhere, (spec,)) == draw_elsewhere(spec)).all()


def test_numbers_of_numpy_and_whole_numbers_make_the_same_set():
    plain = ParamSpec('s', [Continuous('c', 0.0, 1.0), Categorical('k', [1, 2], [0.0, 1.0], [1.0, 2.0])], [Pitch(1, 2), NoteTimes(4.0, 0.0)])
    other = ParamSpec('s', (Continuous('c', np.float32(0), 1), Categorical('k', np.array([1, 2]).tolist(), [np.float64(0), 1], (1, 2))),
        [NoteTimes(4, 0), Pitch(np.int64(1), 2)])
    assert other == plain and config_hash(other.to_dict()) == config_hash(plain.to_dict())


# -- wrong values

SPEC = ParamSpec('small', [Continuous('cutoff', 0.2, 0.8), Categorical('shape', ['sine', 'saw'], [0.25, 0.75]),
    Categorical('mode', ['a', 'b', 'c'], [0, 0.5, 1], encoding='scalar'), Integer('voices', 1, 3, 5)], [Pitch(48, 72), NoteTimes(4.0), Velocity(1, 100)])
PATCH = SPEC.sample(rng_for(1))
ODD = [math.nan, math.inf, -math.inf, -0.1, 1.1, 1e300, 10**400, '0.5', None, True, [0.5], {}]


@pytest.mark.parametrize('name', SPEC.names)
@pytest.mark.parametrize('value', ODD, ids=lambda value: repr(value)[:9])
def test_a_wrong_value_is_refused_by_name(name, value):
    with pytest.raises(UsageError, match=rf'^{name}=.* must be '): SPEC.encode(PATCH._replace(parameters={**PATCH.parameters, name: value}))


@pytest.mark.parametrize('field, name', [('pitch', 'note_pitch'), ('velocity', 'note_velocity'), ('start', 'note_start_end'), ('end', 'note_start_end')])
@pytest.mark.parametrize('value', [*ODD[:3], -1, 200, *ODD[5:]], ids=lambda value: repr(value)[:9])
def test_a_wrong_note_is_refused_by_name(field, name, value):
    with pytest.raises(UsageError, match=rf'^{name}=.* must be '): SPEC.encode(PATCH._replace(note=PATCH.note._replace(**{field: value})))


def test_a_fractional_pitch_is_refused():
    with pytest.raises(UsageError, match='note_pitch=60.0 .* an integer from 48 to 72'): SPEC.encode(PATCH._replace(note=PATCH.note._replace(pitch=60.0)))


@pytest.mark.parametrize('column', range(SPEC.encoded_length))
@pytest.mark.parametrize('value', [math.nan, math.inf, -math.inf, -0.1, 1.1, 1e300])
def test_a_wrong_vector_is_refused_by_name(column, value):
    vector = SPEC.encode(PATCH).astype(np.float64)
    vector[column] = value
    if SPEC.encoded_names[column].startswith('shape=') and -1 < value < 2: return  # any finite row has a largest entry
    name = SPEC.encoded_names[column]
    name = f'(encoded {name}|decoded note_start_end|encoded {name.split("=")[0]})'
    with pytest.raises(UsageError, match=f'^{name}=.* must be '): SPEC.decode(vector)


@pytest.mark.parametrize('vector', [None, [], 'text', [[0.0] * SPEC.encoded_length], [0.0] * 5, ['0'] * SPEC.encoded_length, [None] * SPEC.encoded_length,
    [True] * SPEC.encoded_length, [1j] * SPEC.encoded_length], ids=lambda vector: str(vector)[:12])
def test_no_vector(vector):
    with pytest.raises(UsageError, match='^vector='): SPEC.decode(vector)


@pytest.mark.parametrize('velocity', [0, 128, 64.0, None, '64', math.nan, True])
def test_wrong_velocity(velocity):
    with pytest.raises(UsageError, match='^velocity='): SPEC.sample(rng_for(1), velocity)
    with pytest.raises(UsageError, match='^velocity='): SPEC.decode(SPEC.encode(PATCH), velocity)


@pytest.mark.parametrize('rng', [42, None, np.random, np.random.RandomState(1)])
def test_no_generator(rng):
    with pytest.raises(UsageError, match='^rng='): SPEC.sample(rng)


# -- wrong files

def entry(**changes):
    "The toy set as plain values; each change is the path of an entry and its new value, None to take the key out."
    data = json.loads(json.dumps(SPEC.to_dict()))
    for path, value in changes.items():
        *way, last = [int(part) if part.isdigit() else part for part in path.split('__')]
        place = data
        for part in way: place = place[part]
        if value is None: del place[last]
        else: place[last] = value
    return data


WRONG = [
    (dict(name=''), "name=''"), (dict(name=None), 'name is missing'), (dict(name=5), 'name=5'),
    (dict(parameters=None), 'parameters is missing'), (dict(parameters={}), 'parameters={} must be a list'), (dict(parameters=[]), 'parameters is empty'),
    (dict(parameters='cutoff'), "parameters='cutoff' must be a list"), (dict(note=3), 'note=3 must be a list'), (dict(note=[]), 'note: pitch is missing'),
    (dict(notes=[]), "unknown name 'notes', did you mean 'note'"),
    (dict(parameters__0='cutoff'), r"parameters\[0\]: 'cutoff' must be a mapping"),
    (dict(parameters__0__name=None), r'parameters\[0\]: name is missing'), (dict(parameters__0__name=1), r'parameters\[0\] 1: name=1 must be text'),
    (dict(parameters__0__name=' '), 'must be text'), (dict(parameters__0__name='shape'), "the name 'shape' is there more than once"),
    (dict(parameters__0__name='note_pitch'), "'note_pitch' is taken by the note"),
    (dict(parameters__0__name='shape=sine'), "two numbers of the vector have the name 'shape=sine'"),
    (dict(parameters__0__kind=None), r"parameters\[0\] 'cutoff': kind=None must be one of continuous"),
    (dict(parameters__0__kind='contiguous'), "did you mean 'continuous'"), (dict(parameters__0__kind=['x']), 'kind='),
    (dict(parameters__0__kind='pitch'), "kind='pitch' must be one of continuous"), (dict(note__0__kind='integer'), r'note\[0\]: kind='),
    (dict(parameters__0__minimum=0), "unknown name 'minimum', did you mean 'min'"), (dict(parameters__0__min='low'), "min='low' must be a number from 0 to 1"),
    (dict(parameters__0__min=-1), 'min=-1'), (dict(parameters__0__max=math.nan), 'max=nan'), (dict(parameters__0__max=10**400), 'max=1000'),
    (dict(parameters__0__min=0.9), 'min=0.9 is above max=0.8'), (dict(parameters__0__min=True), 'min=True'),
    (dict(parameters__0__constant_probability=1.5), 'constant_probability=1.5'), (dict(parameters__0__constant=math.inf), 'constant=inf'),
    (dict(parameters__1__values=None), "'shape': values is missing"), (dict(parameters__1__values=[]), r'values=\(\) must be a list'),
    (dict(parameters__1__values='sine'), "values='sine' must be a list"), (dict(parameters__1__values=['sine', 'sine']), 'values holds a choice twice'),
    (dict(parameters__1__values=['sine', ['saw']]), r"values: \['saw'\] must be text"), (dict(parameters__1__values=['sine', math.nan]), 'values: nan'),
    (dict(parameters__1__values=['sine']), 'raw_values has 2 entries, values has 1'), (dict(parameters__1__raw_values=[0.5, 0.5]), 'raw_values holds a value twice'),
    (dict(parameters__1__raw_values=[0.5, 7]), 'raw_values: entry=7'), (dict(parameters__1__raw_values=[0.5, 0.5 + 1e-12]), 'raw_values holds a value twice'),
    (dict(parameters__1__weights=[0, 0]), 'weights must have a positive sum'), (dict(parameters__1__weights=[1, -1]), 'weights: entry=-1'),
    (dict(parameters__1__weights=[1, math.nan]), 'weights: entry=nan'), (dict(parameters__1__weights=[1]), 'weights has 1 entries, values has 2'),
    (dict(parameters__1__weights=2), 'weights=2 must be a list'), (dict(parameters__1__encoding='one-hot'), "encoding='one-hot' must be onehot or scalar"),
    (dict(parameters__1__encoding=[]), 'encoding='),
    (dict(parameters__3__max=5), 'max=5 must be an integer from 0 to 4'), (dict(parameters__3__steps=1), 'steps=1'), (dict(parameters__3__steps=3.0), 'steps=3.0'),
    (dict(parameters__3__min=2.5), 'min=2.5 must be an integer'), (dict(parameters__3__max=None), "'voices': max is missing"),
    (dict(note__0__min=-1), r'note\[0\]: min=-1'), (dict(note__0__max=128), 'max=128'), (dict(note__0__name='pitch'), "unknown name 'name'"),
    (dict(note__1__min=0), 'min=0 must be an integer from 1 to 127'), (dict(note__2__maximum_seconds=0), 'maximum_seconds=0'),
    (dict(note__2__minimum_length=5), 'minimum_length=5'), (dict(note__2__maximum_seconds=math.nan), 'maximum_seconds=nan'),
    (dict(note__2__kind='pitch'), "unknown name 'maximum_seconds'"), (dict(note__2=dict(kind='pitch')), 'pitch is there more than once'),
]


@pytest.mark.parametrize('changes, said', WRONG, ids=[f'{i}-{list(changes)[0]}' for i, (changes, _) in enumerate(WRONG)])
def test_wrong_set(tmp_path, changes, said):
    with pytest.raises(UsageError, match=said): ParamSpec.from_dict(entry(**changes))
    path = tmp_path / 'set.yaml'
    path.write_text(yaml.safe_dump(entry(**changes)))
    with pytest.raises(FormatError, match=f'(?s)^{re.escape(str(path))}: .*{said}'): ParamSpec.from_yaml(path)


def test_all_problems_in_one_error():
    wrong = [change for change, said in WRONG if list(change)[0] in ('parameters__1__weights', 'parameters__0__min', 'note__0__max', 'notes')]
    merged = {key: value for change in wrong for key, value in change.items()}
    with pytest.raises(UsageError) as error: ParamSpec.from_dict(entry(**merged), source='file')
    assert str(error.value).startswith('file: 4 problems\n') and all(word in str(error.value) for word in ('notes', "'cutoff': min", "'shape': weights", 'max=128'))


@pytest.mark.parametrize('content', [b'', b'\xff\xfe', b'a: [', b'- 1', b'text', b'a: 1\na: 2', b'!!python/name:os.system', b'!!bool maybe', b'!!timestamp x', b'a: &b [*b]',
    b'!!int x', b'{[1]: 2}', b'[' * 5000, b'\x00', b'name: &n x\nparameters: *m', b'a: ' + b'9' * 5000, b'? [a]\n: b', b'<<: {a: 1}', b'--- 1\n--- 2',
    b'parameters: &a [*a]', b'!!binary aGk=', b'!!set {a}'], ids=lambda content: repr(content[:20]))
def test_no_parameter_set(tmp_path, content):
    path = tmp_path / 'set.yaml'
    path.write_bytes(content)
    with pytest.raises(FormatError, match=f'^{re.escape(str(path))}: '): load_param_set(path)


@settings(deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=4) | st.dictionaries(
    st.sampled_from(['name', 'kind', 'min', 'max', 'values', 'raw_values', 'weights', 'note', 'parameters', 'x']) | st.integers(), inner, max_size=4)))
def test_any_plain_value_gives_one_clear_error(data):
    for wrong in (data, {'name': 'x', 'parameters': data, 'note': data}, {'name': 'x', 'parameters': [data], 'note': [data]},
            {'name': 'x', 'parameters': [{'name': 'p', 'kind': 'categorical', 'values': data, 'raw_values': data, 'weights': data}], 'note': []},
            {'name': 'x', 'parameters': [{'name': 'p', 'kind': 'integer', 'min': data, 'max': data, 'steps': data}], 'note': []}):
        with pytest.raises(UsageError): ParamSpec.from_dict(wrong)


@pytest.mark.parametrize('name', [None, 3, '', 'surge', 'no/such.yaml', '.', '\0'])
def test_no_such_set(name):
    with pytest.raises(UsageError, match='^param_set='): load_param_set(name)


def test_a_path_can_be_text(tmp_path):
    SPEC.to_yaml(tmp_path / 'mine.yaml')
    assert load_param_set(str(tmp_path / 'mine.yaml')) == load_param_set(tmp_path / 'mine.yaml') == SPEC
    with pytest.raises(FileNotFoundError, match='other.yaml'): load_param_set(tmp_path / 'other.yaml')


@pytest.mark.parametrize('parameters, note', [(None, SPEC.note), ([], SPEC.note), (['cutoff'], SPEC.note), ([Pitch()], SPEC.note), (SPEC.parameters, None),
    (SPEC.parameters, [Continuous('c')]), (SPEC.parameters, []), (SPEC.parameters, [Pitch(), Pitch(), NoteTimes(4)])])
def test_wrong_set_in_code(parameters, note):
    with pytest.raises(UsageError): ParamSpec('x', parameters, note)


# -- plugins

def test_names_that_the_plugin_lacks():
    spec, plugin = load_param_set('surge_full'), [f'parameter_{i}' for i in range(2000)]
    check_names(spec, [*plugin, *spec.names])
    with pytest.raises(UsageError) as error: check_names(spec, plugin)
    assert 'for another plugin: 162 of its 162 parameters are missing' in str(error.value) and len(str(error.value)) < 300
    for count in (1, 20, 21, 40, 41):
        with pytest.raises(UsageError) as error: check_names(spec, [*plugin, *spec.names[count:]])
        lines = str(error.value).splitlines()
        if count == 41: assert len(lines) == 1 and '41 of its 162 parameters' in lines[0]
        else:
            assert f'{2041 - count + 121} parameters: {count} problem' in lines[0] and all(repr(name) in line for name, line in zip(spec.names[:min(count, 20)], lines[1:], strict=False))
            assert len(lines) == 1 + min(count, 20) + (count > 20) and (count <= 20 or lines[-1] == f'  and {count - 20} more')


def test_a_draft_fits_its_plugin_whatever_that_says():
    many = [f'{i} Hz' for i in range(40)]
    draft = draft_spec('draft', [dict(name='plain'), dict(name='twice', values=['a', 'a', 'b']), dict(name='many', values=many),
        dict(name='one', values=['only']), dict(name='endless', steps=2**30), dict(name='single', steps=1), dict(name='switch', boolean=True, steps=2),
        dict(name='given', values=['x', 'y'], raw_values=[0.1, 0.9])])
    assert [p.kind for p in draft.parameters] == ['continuous', 'integer', 'integer', 'categorical', 'continuous', 'continuous', 'categorical', 'categorical']
    assert draft['given'].raw_values == (0.1, 0.9) and draft['many'].maximum == 39
    patch = draft.sample(rng_for(1))
    assert draft.decode(draft.encode(patch)) == patch


# -- what comes with the package

@pytest.mark.parametrize('name', shipped_param_sets())
def test_shipped_set(name):
    spec = load_param_set(name)
    assert spec.name == name and name in repr(spec) and '<table>' in spec._repr_html_()
    for i in range(20):
        patch = spec.sample(rng_for(0, i))
        assert spec.decode(spec.encode(patch)) == patch


def test_configurations_are_no_parameter_sets():
    assert {'surge_full', 'surge_simple'} <= set(shipped_param_sets()) and not any('config' in name for name in shipped_param_sets())


def test_surge_sets_are_those_of_the_table(shared_data, python):
    done = python('scripts/make_surge_specs.py', '--check', '--table', shared_data / 'surge_xt_parameters.json')
    assert done.returncode == 0, done.stdout + done.stderr
    table = json.loads((shared_data / 'surge_xt_parameters.json').read_text())
    for part, count, length in (('full', 162, 300), ('simple', 89, 92)):
        spec, rows = load_param_set(f'surge_{part}'), table[part]['synth']
        assert (len(spec), spec.encoded_length) == (count, length) == (len(rows), table[part]['encoded_length'])
        for p, row in zip(spec.parameters, rows, strict=True):
            assert (p.name, p.kind) == (row['name'], row['kind'])
            if p.kind == 'continuous':
                assert (p.minimum, p.maximum, p.constant_probability) == (row['min'], row['max'], row.get('constant_val_p', 0))
                assert p.constant == row.get('constant_val', 0)
            else: assert [list(p.values), list(p.raw_values), p.weights] == [row['values'], row['raw_values'], tuple(row['weights']) if 'weights' in row else None]
        assert spec['note_pitch'] == Pitch(48, 72) and spec['note_start_end'].maximum_seconds == 4


def test_words_stay_words():
    assert read_yaml('{a: No, b: 1:30, c: 0x10, d: 1_000, e: ~, f: -1.5e3, g: TRUE}', 'x') == dict(a='No', b='1:30', c='0x10', d='1_000', e=None, f=-1500.0, g=True)


def test_all_errors_are_ours():
    assert issubclass(UsageError, DatatoolsError) and issubclass(FormatError, DatatoolsError)
    assert Note(60, 100, 0.0, 1.0)._fields == ('pitch', 'velocity', 'start', 'end')
