"""An exported model scores in KenLM as it does here. Skipped where KenLM is not installed: see benchmarks/build_kenlm.sh."""
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

pytest.importorskip('kenlm', reason='kenlm is not installed; benchmarks/build_kenlm.sh does it')

from benchmarks.groove import joined, kenlm_scores, plain_scores  # noqa: E402
from datatools.groove.arpa import token_words, write_arpa  # noqa: E402
from datatools.groove.events import GrooveConfig  # noqa: E402
from datatools.groove.model import GrooveModel, as_events, table_layout  # noqa: E402
from datatools.groove.smoothing import build_trie  # noqa: E402
from datatools.testing import write_drum_corpus  # noqa: E402


@pytest.mark.parametrize('drum_map, order', [('9', 2), ('9', 5), ('pitch', 4)])
def test_kenlm_scores_an_exported_model_as_we_do(tmp_path, drum_map, order):
    config = GrooveConfig(order, drum_map, min_bytes=0)
    files = write_drum_corpus(tmp_path / 'midi', 30)
    model = GrooveModel(config).fit(files[:20])
    write_arpa(model, tmp_path / 'model.arpa')
    token, starts = joined([as_events(path, config)[0] for path in files[20:]])
    trie = build_trie(*model.table('ngram'), table_layout(config, 'ngram'), config.vocabulary)
    ours = plain_scores(trie, token, starts, config.vocabulary)
    theirs, unknown = kenlm_scores(tmp_path / 'model.arpa', token_words(config), token, starts)
    assert not unknown.any()  # every token of the alphabet has a probability, heard or not
    np.testing.assert_allclose(theirs, ours, atol=1e-4)
