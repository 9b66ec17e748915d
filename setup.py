"""Packaging: every fact comes from settings.ini, so that it is written once."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

parser = ConfigParser(delimiters=['='])
parser.read(Path(__file__).parent / 'settings.ini', encoding='utf-8')
facts = parser['DEFAULT']
min_python = facts['min_python']
supported = [minor for minor in range(10, 14) if minor >= int(min_python.split('.')[1])]

setup(
    name=facts['lib_name'],
    version=facts['version'],
    description=facts['description'],
    long_description=(Path(__file__).parent / 'README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    author=facts['author'],
    author_email=facts['author_email'],
    keywords=facts['keywords'],
    license='Apache-2.0',
    packages=find_packages(include=[facts['lib_path'], f"{facts['lib_path']}.*"]),
    package_data={f"{facts['lib_path']}.vst": ['data/*.yaml']},
    python_requires=f'>={min_python}',
    install_requires=facts['requirements'].split(),
    extras_require={
        'dev': facts['dev_requirements'].split(),
        'cluster': facts['cluster_requirements'].split(),
    },
    entry_points={
        'console_scripts': facts['console_scripts'].split(),
        'nbdev': [f"{facts['lib_name']}={facts['lib_path']}._modidx:d"],
    },
    classifiers=[
        'Development Status :: 3 - Alpha',
        'Intended Audience :: Developers',
        'Intended Audience :: Science/Research',
        'Natural Language :: English',
        *[f'Programming Language :: Python :: 3.{minor}' for minor in supported],
    ],
    zip_safe=False,
)
