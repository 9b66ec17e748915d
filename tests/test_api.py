"""Every public name is explained where it is defined: a docstring, and a comment on every parameter and on what is returned.
Command lines (`__main__`) are left out: they explain themselves with --help, which tests/test_cli.py reads."""
import ast
import importlib
import inspect
import io
import pkgutil
import re
import textwrap
import tokenize
from dataclasses import is_dataclass
from functools import cached_property

import pytest
import typer
from fastcore.docments import docments

import datatools

MODULES = sorted(m.name for m in pkgutil.walk_packages(datatools.__path__, 'datatools.') if not m.name.endswith(('._modidx', '.__main__')))
VAGUE = dict, list, tuple, set, object, inspect.Parameter.empty, inspect.Signature.empty  # what is in them has to be said


def plain_function(thing):
    "What is written in the source behind a property, a class method, compiled or cached code; None for anything else."
    for name in ('fget', '__func__', 'func', 'py_func', '__wrapped__'):
        if not inspect.isfunction(thing) and not inspect.isclass(thing): thing = getattr(thing, name, thing)
    return thing if inspect.isfunction(thing) else None


def returns_something(function) -> bool:
    "Is there a `return value` or a `yield` in its own body?"
    def own(node):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)): continue
            yield child
            yield from own(child)
    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    return any(isinstance(n, ast.YieldFrom) or isinstance(n, (ast.Yield, ast.Return)) and n.value is not None for n in own(tree))


def has_help(annotation) -> bool:
    "Does an option of the command line say what it is for?"
    return any(getattr(each, 'help', None) for each in getattr(annotation, '__metadata__', ()))


def of_datatools(annotation) -> bool:
    "Is it a class of this package, which is explained where it is defined?"
    return inspect.isclass(annotation) and annotation.__module__.startswith('datatools')


def return_is_commented(function) -> bool:
    "Is there a comment behind the parenthesis that ends the parameters?"
    head, depth = inspect.getsource(function), 0
    for token in tokenize.generate_tokens(io.StringIO(textwrap.dedent(head)).readline):
        depth += (token.string in '([{') - (token.string in ')]}') if token.type == tokenize.OP else 0
        if token.type == tokenize.OP and token.string == ':' and not depth:
            return '#' in token.line[token.end[1]:]
    return False


def silent_fields(named_tuple) -> list:
    "Fields of a named tuple without a comment in their lines; one that is made from a table has no lines."
    if f'class {named_tuple.__name__}(' not in inspect.getsource(inspect.getmodule(named_tuple)): return []
    lines = inspect.getsource(named_tuple).splitlines()
    return [name for name in named_tuple._fields if not any(re.match(rf'\s+{name}\s*:.*#', line) for line in lines)]


def unexplained(thing, whole: bool = True) -> list:
    "What is missing: 'docstring', names of parameters, 'return'. A parameter may also be explained in the docstring, as `name`."
    text, found = inspect.getdoc(thing) or '', []
    if not text.strip(): found.append('docstring')
    if not whole: return found
    if hasattr(thing, '_fields'): return found + silent_fields(thing)
    notes = {name: note for name, note in docments(thing, full=True, returns=True).items() if name not in ('self', 'cls')}
    for name, note in notes.items():
        if name == 'return' or note.docment or has_help(note.anno) or of_datatools(note.anno): continue
        if not re.search(rf'`\**{re.escape(name)}\b', text) and not re.search(rf'\*{name}\b[^#\n]*# \S', inspect.getsource(thing)): found.append(name)
    if inspect.isfunction(thing) and set(notes) - {'return'} and returns_something(thing):  # without parameters, the docstring says it
        note = notes.get('return')
        said = note and (note.docment or note.anno is None or isinstance(note.anno, type) and note.anno not in VAGUE and note.anno.__module__ != 'numpy')
        if not said and not return_is_commented(thing): found.append('return')
    return found


def public(module) -> dict:
    "name -> (what is to be explained, with parameters and return?) of one module"
    found, apps = {}, [each for each in vars(module).values() if isinstance(each, typer.Typer)]
    commands = [entry.callback for app in apps for entry in (*app.registered_commands, app.registered_callback) if entry]
    for name in getattr(module, '__all__', ()):
        thing = getattr(module, name)
        if thing in commands and all(has_help(parameter.annotation) for parameter in inspect.signature(thing).parameters.values()): continue
        if getattr(thing, '__module__', None) != module.__name__: continue
        if not inspect.isclass(thing):
            if function := plain_function(thing): found[name] = function, True
            continue
        built = is_dataclass(thing) or hasattr(thing, '_fields') or plain_function(vars(thing).get('__init__'))
        found[name] = thing, bool(built) and not issubclass(thing, BaseException)
        for method, value in vars(thing).items():
            if method.startswith('_') or hasattr(thing, '_fields') and method in thing._fields: continue
            if any(method in vars(base) for base in thing.__mro__[1:] if base is not object): continue  # explained where it comes from
            if function := plain_function(value): found[f'{name}.{method}'] = function, not isinstance(value, (property, cached_property))
    return found


@pytest.mark.parametrize('name', MODULES)
def test_public_names_are_explained(name):
    missing = {key: lacks for key, (thing, whole) in public(importlib.import_module(name)).items() if (lacks := unexplained(thing, whole))}
    assert not missing, '\n'.join(f'{name}.{key}: {", ".join(lacks)}' for key, lacks in missing.items())


def test_what_is_missing_is_seen():
    def silent(a, b): return a
    def half(
        a,  # a number
        b,
    ):
        "Says little"
        return [a]
    def good(
        a,        # a number
        b=1,      # another
    ):            # their sum, in a list
        "Add `c`-like numbers"
        return [a + b]
    assert unexplained(silent) == ['docstring', 'a', 'b', 'return']
    assert unexplained(half) == ['b', 'return']
    assert unexplained(good) == []


def test_a_wing_gives_what_one_usually_needs():
    for wing in ('groove', 'stft', 'vst', 'pool'):
        module = importlib.import_module(f'datatools.{wing}')
        assert module.__all__ == sorted(module.__all__, key=lambda name: (name[0].islower(), name)), f'datatools.{wing}.__all__ is not in order'
        for name in module.__all__: assert getattr(module, name).__module__.startswith((f'datatools.{wing}.', 'datatools.loader'))
