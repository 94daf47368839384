"""The loss mask is checked against a hand-written mask built piece by piece, never against the code under test."""

import pytest

from specbench.data.answers.chat import encode, prompt_ids, render
from specbench.data.answers.templates import ChatError, template_hash
from tests.data.tokenizers_small import BROKEN, CHATML, GENERATION, THINKING, tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
ASK = {"role": "user", "content": "What is 2 + 2?"}
SAY = {"role": "assistant", "content": "The answer is 4."}
AGAIN = {"role": "user", "content": "Write a function."}
CODE = {"role": "assistant", "content": "def f(x):\n    return x\n"}
DIALOGUE = [SYSTEM, ASK, SAY, AGAIN, CODE]


def pieces(tok, parts):
    """[(text, supervised)] -> tokens and mask, each part tokenised alone."""
    tokens, mask = [], []
    for text, supervised in parts:
        ids = tok(text, add_special_tokens=False)["input_ids"]
        tokens += ids
        mask += [supervised] * len(ids)
    return tokens, mask


def by_hand(tok):
    return pieces(
        tok,
        [
            ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n", False),
            ("<|im_start|>assistant\n", False),
            ("The answer is 4.<|im_end|>", True),
            ("\n<|im_start|>user\nWrite a function.<|im_end|>\n<|im_start|>assistant\n", False),
            ("def f(x):\n    return x\n<|im_end|>", True),
            ("\n", False),
        ],
    )


@pytest.mark.parametrize("template", [CHATML, GENERATION])
def test_mask_covers_answers_and_their_stop_token(template):
    tok = tokenizer(template)
    encoded = encode(tok, DIALOGUE, id="a", source="s")
    assert (encoded.tokens, encoded.loss_mask) == by_hand(tok)
    assert (encoded.id, encoded.source, encoded.truncated, encoded.unsupervised) == ("a", "s", False, 0)


def test_the_prompt_is_a_prefix_and_the_first_supervised_token_follows_it():
    tok = tokenizer()
    encoded = encode(tok, DIALOGUE)
    for turns in (2, 4):
        prompt = prompt_ids(tok, DIALOGUE[:turns])
        assert encoded.tokens[: len(prompt)] == prompt
        assert encoded.loss_mask[len(prompt)] and not encoded.loss_mask[len(prompt) - 1]


@pytest.mark.parametrize("with_stop", [True, False])
def test_exact_answer_tokens_replace_the_retokenisation(with_stop):
    """Answers spelled byte by byte are other tokens than the tokenizer's own; they must survive."""
    tok = tokenizer()
    stop = tok.convert_tokens_to_ids("<|im_end|>")
    spelled = [[tok(c, add_special_tokens=False)["input_ids"][0] for c in m["content"]] for m in (SAY, CODE)]
    assert spelled[0] != tok(SAY["content"], add_special_tokens=False)["input_ids"]
    given = [s + [stop] * with_stop for s in spelled]
    encoded = encode(tok, DIALOGUE, answer_tokens=given)
    runs, run = [], []
    for token, supervised in zip(encoded.tokens, encoded.loss_mask, strict=True):
        if supervised:
            run.append(token)
        elif run:
            runs.append(run)
            run = []
    assert runs == [[*s, stop] for s in spelled]
    assert tok.decode(encoded.tokens) == tok.decode(encode(tok, DIALOGUE).tokens)
    history = prompt_ids(tok, DIALOGUE[:4], answer_tokens=given[:1])
    assert encoded.tokens[: len(history)] == history


def test_retokenised_answer_tokens_change_nothing():
    tok = tokenizer()
    given = [tok(m["content"], add_special_tokens=False)["input_ids"] for m in (SAY, CODE)]
    assert encode(tok, DIALOGUE, answer_tokens=given) == encode(tok, DIALOGUE)


@pytest.mark.parametrize("template", [CHATML, GENERATION])
def test_a_cut_answer_has_no_supervised_stop(template):
    tok = tokenizer(template)
    stop = tok.convert_tokens_to_ids("<|im_end|>")
    whole = encode(tok, DIALOGUE)
    for answers in (None, [tok(m["content"], add_special_tokens=False)["input_ids"] for m in (SAY, CODE)]):
        early = encode(tok, DIALOGUE, cut=[True, False], answer_tokens=answers)
        assert early.tokens == whole.tokens
        assert sum(whole.loss_mask) - sum(early.loss_mask) == 1
        late = encode(tok, DIALOGUE, cut=[False, True], answer_tokens=answers)
        assert late.tokens[-1] != stop and late.loss_mask[-1]
        assert late.tokens == whole.tokens[: len(late.tokens)] and len(whole.tokens) - len(late.tokens) == 2


def test_history_that_the_template_rewrites():
    """Non-thinking Qwen3 style: the last answer follows an empty think block, earlier ones have none."""
    tok = tokenizer(THINKING)
    encoded = encode(tok, [ASK, SAY, AGAIN, CODE], thinking=False)
    expected = pieces(
        tok,
        [
            ("<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n", False),
            ("The answer is 4.<|im_end|>", True),
            ("\n<|im_start|>user\nWrite a function.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
            ("def f(x):\n    return x\n<|im_end|>", True),
            ("\n", False),
        ],
    )
    assert (encoded.tokens, encoded.loss_mask) == expected
    assert encoded.unsupervised == 0
    prompt = prompt_ids(tok, [ASK, SAY, AGAIN], thinking=False)
    assert encoded.tokens[: len(prompt)] == prompt


def test_thinking_dropped_from_the_history_is_counted_and_not_supervised():
    tok = tokenizer(THINKING)
    thoughtful = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nThe answer is 4."}
    final = {"role": "assistant", "content": "<think>\nso\n</think>\n\nA function."}
    for given in (None, [tok(m["content"], add_special_tokens=False)["input_ids"] for m in (thoughtful, final)]):
        encoded = encode(tok, [ASK, thoughtful, AGAIN, final], thinking=True, answer_tokens=given)
        supervised = [t for t, m in zip(encoded.tokens, encoded.loss_mask, strict=True) if m]
        assert encoded.unsupervised == 1
        assert tok.decode(supervised) == "<think>\nso\n</think>\n\nA function.<|im_end|>"
        assert "hm" not in tok.decode(encoded.tokens)


def test_a_template_without_the_prefix_property_is_refused():
    with pytest.raises(ChatError, match="prefix property"):
        encode(tokenizer(BROKEN), [ASK, SAY])


def test_a_template_without_a_stop_token_is_refused():
    lines = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    plain = lines + "{% if add_generation_prompt %}assistant: {% endif %}"
    with pytest.raises(ChatError, match="learn to stop"):
        encode(tokenizer(plain), [ASK, SAY], answer_tokens=[[300]])


def test_masks_of_nothing_and_of_everything_are_errors():
    tok = tokenizer()
    with pytest.raises(ChatError, match="holds no answer"):
        encode(tok, [ASK])
    with pytest.raises(ChatError, match="max_length=5"):
        encode(tok, [ASK, SAY], max_length=5)
    bare = tokenizer("{% for m in messages %}{{ m['content'] }}<|im_end|>{% endfor %}")
    with pytest.raises(ChatError, match="everything is supervised"):
        encode(bare, [SAY])


def test_truncation_is_reported():
    tok = tokenizer()
    whole = encode(tok, [ASK, SAY])
    cut = encode(tok, [ASK, SAY], max_length=len(whole.tokens) - 3)
    assert cut.truncated and cut.tokens == whole.tokens[:-3] and cut.loss_mask == whole.loss_mask[:-3]
    assert not encode(tok, [ASK, SAY], max_length=len(whole.tokens)).truncated


def test_multibyte_text_is_masked_at_token_edges():
    tok = tokenizer()
    answer = {"role": "assistant", "content": "π ≈ 3.14 — 数学 🙂"}
    encoded = encode(tok, [ASK, answer])
    supervised = [t for t, m in zip(encoded.tokens, encoded.loss_mask, strict=True) if m]
    assert tok.decode(supervised) == answer["content"] + "<|im_end|>"


def test_wrong_counts_and_missing_templates_say_so():
    tok = tokenizer()
    with pytest.raises(ChatError, match="answer_tokens has 1 entries for the 2 answers"):
        encode(tok, DIALOGUE, answer_tokens=[[1]])
    with pytest.raises(ChatError, match="ends in an answer"):
        prompt_ids(tok, [ASK, SAY])
    tok.chat_template = None
    with pytest.raises(ChatError, match="no chat template"):
        encode(tok, [ASK, SAY])


def test_preview_colours_exactly_the_supervised_text():
    tok = tokenizer()
    text = render(tok, encode(tok, [ASK, SAY]))
    coloured = [text.plain[s.start : s.end] for s in text.spans if "green" in str(s.style)]
    assert coloured == ["The answer is 4.<|im_end|>"]
    assert (
        text.plain == "<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\nThe answer is 4.<|im_end|>\n"
    )
    assert template_hash(tok) != template_hash(tokenizer(THINKING))
