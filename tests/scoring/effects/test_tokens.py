"""The tokenizer in use decides which tokens count: action signs do, the punctuation around them does not."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from scoring.effects.tokens import countable_token_mask, token_facts

WORDS = ["add", "Ġ+", "-", "*", "/", "=", "<", 'Ġ"+"}', "7", "_", "é"]
PUNCTUATION = ['"', '{"', '"}', "Ġ", "Ċ", ":", 'Ġ"', '",', "'", "`", "!", "?", "()", "[]", ".", ";"]
SPECIAL = ["<pad>", "<end>", "<image>"]


def make_tokenizer(**special):
    pieces = SPECIAL + WORDS + PUNCTUATION
    letters = pre_tokenizers.ByteLevel.alphabet()
    pieces += sorted(set(letters) - set(pieces))
    tokenizer = Tokenizer(models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special), pieces


def test_signs_and_words_count_and_punctuation_and_special_tokens_do_not():
    tokenizer, pieces = make_tokenizer(pad_token="<pad>", eos_token="<end>")
    mask = countable_token_mask(tokenizer, range(len(pieces)))
    counted = {piece for piece, counts in zip(pieces, mask, strict=True) if counts}
    assert counted >= set(WORDS) - {"é"}
    assert not counted & set(PUNCTUATION)
    assert not counted & set(SPECIAL)


def test_facts_cover_every_id_the_model_can_sample():
    tokenizer, pieces = make_tokenizer(pad_token="<pad>", eos_token="<end>")
    facts = token_facts(tokenizer, vocab_size=len(pieces) + 64)
    assert facts.vocab_size == len(pieces) + 64 == len(facts.countable_by_id)
    assert not facts.countable_by_id[len(pieces) :].any()
    assert facts.null_id == pieces.index("<pad>")
    assert token_facts(tokenizer).vocab_size == len(pieces)


def test_null_token_is_padding_then_unknown_then_end():
    assert token_facts(make_tokenizer(unk_token="<image>", eos_token="<end>")[0]).null_id == 2
    assert token_facts(make_tokenizer(eos_token="<end>")[0]).null_id == 1
    with pytest.raises(ValueError, match="pad_token"):
        token_facts(make_tokenizer()[0])
