"""Templates that read the clock, and templates that drop what the target thought."""

import datetime

import pytest

from specbench.data.answers import engines, templates
from specbench.data.answers.chat import encode, prompt_ids
from specbench.data.answers.templates import ChatError, date_of, render_text, server_options, template_of
from specbench.data.cache.manifest import fingerprint, tokenizer_facts
from tests.data.chat_server import ChatServer
from tests.data.dialogues import QUICK, prompts
from tests.data.tokenizers_small import CHATML, tokenizer

ASK, SAY = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "The answer is 4."}
# As Llama 3.2 and 3.3 do, and as gpt-oss and Mistral do.
LLAMA = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}"
    "{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}"
    "<|im_start|>system\nToday: {{ date_string }}<|im_end|>\n" + CHATML
)
OSS = "<|im_start|>system\nCurrent date: {{ strftime_now('%Y-%m-%d') }}<|im_end|>\n" + CHATML
# Like DeepSeek-R1's: thinking is cut from every answer; the prompt opens it (or not, as in its first version).
R1 = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}{% set words = m['content'] %}"
    "{% if '</think>' in words %}{% set words = words.split('</think>')[-1] %}{% endif %}"
    "<|im_start|>{{ words }}<|im_end|>{% else %}{{ m['role'] }}: {{ m['content'] }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>OPEN{% endif %}"
)


class Tomorrow(datetime.datetime):
    """A clock that is ahead."""

    @classmethod
    def now(cls, tz=None):
        return cls(2031, 5, 17)


@pytest.fixture
def tomorrow(monkeypatch):
    monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", Tomorrow)


@pytest.mark.parametrize(("template", "day"), [(LLAMA, "Today: 26 Jul 2024"), (OSS, "Current date: 2024-07-26")])
def test_the_clock_stands_still(template, day, tomorrow):
    tok = tokenizer(template)
    assert "2031" in tok.apply_chat_template([ASK], tokenize=False) or "17 May" in tok.apply_chat_template(
        [ASK], tokenize=False
    )
    assert day in render_text(tok, [ASK], prompt=True) and day in tok.decode(encode(tok, [ASK, SAY]).tokens)
    assert day in tok.decode(prompt_ids(tok, [ASK]))
    exact = encode(tok, [ASK, SAY], answer_tokens=[tok(SAY["content"])["input_ids"]])
    assert exact.tokens == encode(tok, [ASK, SAY]).tokens


FORMS = [
    "%Y-%m-%d",
    "%d %b %Y",
    "%d-%m-%Y",
    "%A, %B %-d, %Y",
    "%x %X %j %U",
    "%H:%M:%S",
    "100%% %d",
    "%%d",
    "no form",
    "",
]


@pytest.mark.parametrize("form", FORMS)
def test_the_clock_writes_every_form_as_the_library_would(form):
    day = datetime.datetime.fromisoformat(templates.DATE)
    lines = f"\n  {{% if true %}}\n{{{{ strftime_now({form!r}) }}}}!\n  {{% endif %}}\n" + CHATML
    written = render_text(tokenizer(lines), [ASK])
    assert written == render_text(tokenizer(lines.replace(f"strftime_now({form!r})", repr(day.strftime(form)))), [ASK])
    inside = "{% macro head() %}{{ strftime_now('%Y') }}{% endmacro %}{{ head() }}" + CHATML
    assert render_text(tokenizer(inside), [ASK]).startswith("2024<|im_start|>")


def test_the_date_is_recorded_where_tokens_are(monkeypatch):
    tok, plain = tokenizer(LLAMA), tokenizer()
    assert date_of(tok) == templates.DATE and date_of(plain) is None and date_of(None) is None
    facts = tokenizer_facts(tok)
    assert facts["date"] == templates.DATE and "date" not in tokenizer_facts(plain)
    recorded = templates.template_facts(tok)
    assert recorded == {"template": templates.template_hash(tok), "template_date": templates.DATE}
    assert set(templates.template_facts(plain)) == {"template"} and templates.template_facts(None) == {}
    before = fingerprint(facts)
    monkeypatch.setattr(templates, "DATE", "2025-01-01")
    assert fingerprint(tokenizer_facts(tok)) != before and "01 Jan 2025" in render_text(tok, [ASK])


def test_generation_marks_are_rendered_at_the_same_date(tomorrow):
    words = "{{ m['content'] }}"
    answer = f"{{% generation %}}{words}{{% endgeneration %}}"
    marked = LLAMA.replace(words, f"{{% if m['role'] == 'assistant' %}}{answer}{{% else %}}{words}{{% endif %}}")
    assert encode(tokenizer(marked), [ASK, SAY]).tokens == encode(tokenizer(LLAMA), [ASK, SAY]).tokens


def test_servers_are_told_the_date_or_refused(tmp_path):
    assert server_options(CHATML, None) == {} and server_options(CHATML, False) == {"enable_thinking": False}
    options = server_options(LLAMA, None)
    tok = tokenizer(LLAMA)
    assert options == {"date_string": "26 Jul 2024"}
    assert tok.apply_chat_template([ASK], tokenize=False, **options) == render_text(tok, [ASK])
    with pytest.raises(ValueError, match=r"writes today's date and takes no date_string.*servers=\[\]"):
        server_options(template_of(tokenizer(OSS)), None)
    with ChatServer() as server:
        asker = engines.ServerEngine([server.url], "tiny", patience=QUICK, options=options)
        asker.answer(iter(prompts(2)), engines.AnswerPolicy("tiny", date=templates.DATE), lambda kind, row: None)
        assert [body["chat_template_kwargs"] for body in server.bodies] == [options] * 2


@pytest.mark.parametrize("opening", ["", "<think>\n"])
@pytest.mark.parametrize("with_stop", [True, False])
@pytest.mark.parametrize("cut", [True, False])
def test_exact_tokens_are_kept_where_the_template_drops_thinking(opening, with_stop, cut):
    tok = tokenizer(R1.replace("OPEN", opening))
    stop = tok.convert_tokens_to_ids("<|im_end|>")
    first, second = "hm, two and two</think>The answer is 4.", "so</think>A function."
    said = [{"role": "assistant", "content": text} for text in (first, second)]
    spelled = [[tok(c, add_special_tokens=False)["input_ids"][0] for c in text] for text in (first, second)]
    exact = [tokens + [stop] * with_stop for tokens in spelled]
    talk = [ASK, said[0], ASK, said[1]]
    coded = encode(tok, talk, answer_tokens=exact, cut=[False, cut])
    prompt = prompt_ids(tok, talk[:-1], None, exact[:1])
    ended = with_stop or not cut
    assert coded.tokens == prompt + spelled[1] + [stop] * ended
    assert coded.loss_mask == [False] * len(prompt) + [True] * (len(spelled[1]) + ended)
    assert coded.unsupervised == 1 and tok.decode(prompt).endswith("<|im_start|>" + opening)
    alone = encode(tok, talk[:2], answer_tokens=exact[:1])
    begun = prompt_ids(tok, [ASK])
    assert (alone.tokens, alone.unsupervised) == ([*begun, *spelled[0], stop], 0)
    assert alone.loss_mask == [False] * len(begun) + [True] * (len(spelled[0]) + 1)


def test_without_exact_tokens_dropped_thinking_is_refused():
    said = {"role": "assistant", "content": "hm</think>The answer is 4."}
    with pytest.raises(ChatError, match=r"drops a part of the last answer.*exact answer_tokens"):
        encode(tokenizer(R1.replace("OPEN", "")), [ASK, said])
    with pytest.raises(ChatError, match="prefix property"):
        encode(tokenizer(R1.replace("OPEN", "<think>\n")), [ASK, said])


@pytest.mark.parametrize(
    "fault",
    ["{{ 1 / 0 }}", "{{ messages[99].content.x }}", "{{ raise_exception('no') }}", "{{ messages | sum }}", "{{ x() }}",
     "{% for i in range(10 ** 9) %}{% endfor %}", "{{ ''.__class__.__mro__ }}", "{% if %}", "{{ messages.append(1) }}"],
)  # fmt: skip
def test_whatever_a_template_raises_is_one_sentence(fault):
    with pytest.raises(ChatError, match="the chat template refuses a conversation of roles user"):
        render_text(tokenizer(CHATML + fault), [ASK])
