"""Prompt formats token by token, as the code bases write them, and generations that end where a format ends."""

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from uipe_core.corpora.types import UTILITY_SETS, Corpus, Item
from uipe_core.errors import UserError
from uipe_core.metrics.definitions import DEFINITIONS
from uipe_core.models.loading import LoadedModel
from uipe_core.models.prompts import FORMATS, PromptFormat, prompt_schema
from uipe_core.scoring.scorer import Scorer, ScoringConfig

QUESTION, ANSWER = "Who wrote it?", "Zoe Lee."
TURNS, DATE = ["system", "user", "assistant"], ["Today", "Date", ":", "10", "Apr", "2025"]
WORDS = [*TURNS, *DATE, "You", "are", "a", "helpful", ".", "Who", "wrote", "it", "?", "Zoe", "Lee"]
BEGIN, END_OF_TEXT, START_HEADER, END_HEADER, EOT, BLANK_LINE = 0, 1, 2, 3, 4, 6

SYSTEM_TURN = [BEGIN, START_HEADER, 8, END_HEADER, BLANK_LINE, 11, 12, 13, 14, 15, 16, BLANK_LINE]
ASKED = [EOT, START_HEADER, 9, END_HEADER, BLANK_LINE, 22, 23, 24, 25, EOT, START_HEADER, 10, END_HEADER, BLANK_LINE]
LLAMA3_PROMPT = [*SYSTEM_TURN, 17, 18, 19, 20, 10, 21, *ASKED]
LLAMA3_ANSWER = [26, 27, 21, EOT]

LLAMA2_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + message['content'].strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA2_PIECES = ["<unk>", "<s>", "</s>", "▁[", "INST", "]", "/", "▁Who", "▁wrote", "▁it", "?", "Zoe", "▁Zoe", "▁Lee", "."]
LLAMA2_PROMPT = [1, 3, 4, 5, 7, 8, 9, 10, 3, 6, 4, 5]
PHI_PIECES = ["<unk>", "<|endoftext|>", "Question", ":", "▁Who", "▁wrote", "▁it", "?", "\n", "Answer", "▁Zoe", "▁Lee", "."]


def pieces(vocabulary, eos, bos=None, adds_eos=False, spare=()):
    """A SentencePiece tokenizer (``▁`` for a space) whose ids are the positions in the vocabulary; longer pieces win."""
    scores = {piece: -1.0 / len(piece) for piece in [*vocabulary, *spare, "▁"]}
    tokenizer = Tokenizer(models.Unigram(list(scores.items()), unk_id=0))
    # As in Llama 2, a space is put in front; as in Phi, none.
    scheme = "first" if bos else "never"
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme=scheme)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in (bos, eos) if token])
    if bos:
        single = f"{bos} $A {eos}" if adds_eos else f"{bos} $A"
        special = [(token, tokenizer.token_to_id(token)) for token in (bos, eos)]
        tokenizer.post_processor = processors.TemplateProcessing(single=single, special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos, eos_token=eos)


def llama2(**options):
    return pieces(LLAMA2_PIECES, "</s>", "<s>", **options)


def prompt_and_answer(prompts, answer=ANSWER):
    example = prompts.encode(QUESTION, answer)
    ids = list(example.input_ids)
    return ids[: example.prompt_length], ids[example.prompt_length :]


def test_llama3_has_its_system_prompt_its_date_and_one_end_of_turn(llama3):
    prompts = PromptFormat(llama3.of_words(WORDS), name="llama3")
    assert prompt_and_answer(prompts) == (LLAMA3_PROMPT, LLAMA3_ANSWER)
    assert prompts.prompt_ids(QUESTION) == LLAMA3_PROMPT
    assert prompts.stop_ids == [EOT]


def test_llama3_tokens_are_those_of_the_chat_template_itself(llama3):
    tokenizer = llama3.of_words(WORDS)
    chat = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": ANSWER},
    ]
    whole = tokenizer.apply_chat_template(chat, tokenize=True, return_dict=False, date_string="10 Apr 2025")
    assert list(PromptFormat(tokenizer, name="llama3").encode(QUESTION, ANSWER).input_ids) == whole


def test_an_end_of_turn_that_is_not_the_end_of_sequence_closes_the_answer_and_a_generation(llama3):
    prompts = PromptFormat(llama3.of_words(WORDS, eos="<|end_of_text|>"), name="llama3")
    assert prompt_and_answer(prompts) == (LLAMA3_PROMPT, LLAMA3_ANSWER)
    assert prompts.stop_ids == [EOT, END_OF_TEXT]


@pytest.mark.parametrize("name", ["chat", None])
def test_a_chat_template_of_its_own_gets_no_system_prompt_and_the_same_date_every_day(llama3, name):
    prompts = PromptFormat(llama3.of_words(WORDS), name=name)
    assert prompt_and_answer(prompts) == ([*SYSTEM_TURN, *ASKED], LLAMA3_ANSWER)


def test_an_answer_is_trimmed_and_spaced_as_the_chat_template_does(llama3):
    assert prompt_and_answer(PromptFormat(llama3.of_words(WORDS)), " Zoe Lee.\n")[1] == LLAMA3_ANSWER
    tokenizer = llama2()
    tokenizer.chat_template = LLAMA2_TEMPLATE
    # "<s>[INST] Who wrote it? [/INST] Zoe Lee. </s>": a space before the answer, one behind it, and one end token.
    prompt, answer = prompt_and_answer(PromptFormat(tokenizer, name="chat"))
    space = tokenizer.convert_tokens_to_ids("▁")
    assert (prompt[0], prompt[-5:], answer) == (1, [10, 3, 6, 4, 5], [12, 13, 14, space, 2])


def test_what_a_template_writes_behind_the_end_token_is_left_out(llama3):
    tokenizer = llama3.of_words([*WORDS, "end"], eos="<|end_of_text|>")
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['role'] + '\n' + message['content'] + '<|eot_id|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant\n' }}{% endif %}"
    )
    assert prompt_and_answer(PromptFormat(tokenizer)) == ([9, 7, 22, 23, 24, 25, EOT, 7, 10, 7], LLAMA3_ANSWER)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|eot_id|>", "")
    assert prompt_and_answer(PromptFormat(tokenizer)) == ([9, 7, 22, 23, 24, 25, 7, 10, 7], [26, 27, 21, END_OF_TEXT])


def test_a_prompt_that_opens_more_than_an_answer_keeps_is_followed_by_the_answer(llama3):
    tokenizer = llama3.of_words([*WORDS, "think"])
    tokenizer.chat_template = (
        "{% for message in messages %}{{ message['content'] + '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant think\n' }}{% endif %}"
    )
    assert prompt_and_answer(PromptFormat(tokenizer)) == ([22, 23, 24, 25, EOT, 10, 28, 7], LLAMA3_ANSWER)


def test_llama2_is_tagged_and_ends_in_the_end_of_sequence():
    prompts = PromptFormat(llama2(), name="llama2")
    assert prompt_and_answer(prompts) == (LLAMA2_PROMPT, [11, 13, 14, 2])
    assert prompts.prompt_ids(QUESTION) == LLAMA2_PROMPT
    assert prompts.stop_ids == [2]


def test_a_tokenizer_that_adds_an_end_token_by_itself_has_one_behind_the_answer_and_none_behind_the_prompt():
    prompts = PromptFormat(llama2(adds_eos=True), name="llama2")
    assert prompt_and_answer(prompts) == (LLAMA2_PROMPT, [11, 13, 14, 2])
    assert prompts.prompt_ids(QUESTION) == LLAMA2_PROMPT


def test_phi_has_the_answer_tag_in_what_it_must_say():
    # In the logs of locuslab/tofu a one-word answer has 4 tokens: the tag's two, the word, the end.
    prompts = PromptFormat(pieces(PHI_PIECES, "<|endoftext|>"), name="phi")
    assert prompt_and_answer(prompts) == ([2, 3, 4, 5, 6, 7, 8], [9, 3, 10, 11, 12, 1])
    assert prompt_and_answer(prompts, "Zoe")[1] == [9, 3, 10, 1]
    assert prompts.prompt_text(QUESTION) == "Question: Who wrote it?\n"


def test_a_token_across_the_border_carries_no_loss_in_the_format_of_a_code_base():
    tokenizer = llama2(spare=["]Zoe"])
    border = tokenizer.convert_tokens_to_ids("]Zoe")
    counted, apart = PromptFormat(tokenizer, name="llama2"), PromptFormat(tokenizer, "[INST] {question} [/INST]")
    assert prompt_and_answer(counted) == ([*LLAMA2_PROMPT[:-1], border], [13, 14, 2])
    assert prompt_and_answer(apart)[0] == LLAMA2_PROMPT
    assert border not in prompt_and_answer(apart)[1]
    # Whatever the tokenizer does, the end token at least carries loss.
    assert prompt_and_answer(counted, "Zoe") == ([*LLAMA2_PROMPT[:-1], border], [2])


@pytest.mark.parametrize("adds_eos", [False, True])
@pytest.mark.parametrize("template", ["<s>[INST] {question} [/INST]", "[INST] {question} [/INST]"])
def test_a_template_that_begins_with_what_the_tokenizer_adds_has_it_once(template, adds_eos):
    prompts = PromptFormat(llama2(adds_eos=adds_eos), template)
    prompt, answer = prompt_and_answer(prompts)
    assert prompt == prompts.prompt_ids(QUESTION)
    assert (prompt[0], prompt.count(1)) == (1, 1)
    assert answer[-1] == prompts.eos_id and answer.count(prompts.eos_id) == 1
    again = PromptFormat(llama2(adds_eos=adds_eos), "<s>{question}").encode("", ANSWER)
    assert again.input_ids.count(1) == 1


def test_only_templates_that_may_begin_with_a_special_token_have_other_base_runs_than_before():
    assert [prompt_schema(text) for text in (None, "[INST] {question} [/INST]", "Q: {question}")] == [1, 1, 1]
    assert prompt_schema("<s>{question}") == 2


def test_a_text_that_the_tokenizer_cannot_encode_is_named():
    words = Tokenizer(models.WordLevel({"known": 0, "</s>": 1}, unk_token="<unk>"))
    prompts = PromptFormat(PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>"), "{question}")
    with pytest.raises(UserError, match=r"its tokenizer cannot encode 'strange' .*Missing .*UNK.*correct the text"):
        prompts.prompt_ids("strange")


def test_an_unknown_format_is_refused_with_what_is_known():
    with pytest.raises(UserError, match=r"prompt_format: 'lama3' is unknown; known: chat, .*Did you mean 'llama3'\?"):
        PromptFormat(llama2(), name="lama3")


def test_a_format_and_a_template_are_one_too_many():
    with pytest.raises(UserError, match="prompt_format and prompt_template are both given"):
        PromptFormat(llama2(), "{question}", "phi")


@pytest.mark.parametrize("name", ["llama3", "chat"])
def test_a_format_by_chat_template_needs_one(name):
    assert name in FORMATS
    with pytest.raises(UserError, match=f"no chat template, so prompt_format '{name}' cannot be used; give .*llama2 or phi"):
        PromptFormat(llama2(), name=name)


@pytest.mark.parametrize(
    ("template", "said"),
    [
        ("{{ messages[-1]['content'] }}", "leaves out the system prompt of prompt_format 'llama3'; use prompt_format: chat"),
        ("{{ raise_exception('no system role') }}", "cannot write a question in prompt_format 'llama3': no system role"),
        ("{{ messages[0]['content'] }}", "leaves out answers"),
        ("{% for i in range(999999999) %}{% endfor %}", "cannot write a question in prompt_format 'llama3': Range too big"),
        ("{{ 1 / 0 }}", "cannot write a question in prompt_format 'llama3': division by zero"),
        ("{{ messages[5]['content'] + 1 }}", "cannot write a question in prompt_format 'llama3'"),
        ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "cannot write a question in prompt_format 'llama3'"),
        ("{{ strftime_now('%d %b %Y') }}", "writes today's date, so its prompts would change overnight"),
    ],
)
def test_a_chat_template_that_cannot_do_it_is_refused(template, said):
    tokenizer = llama2()
    tokenizer.chat_template = template
    with pytest.raises(UserError, match=said):
        PromptFormat(tokenizer, name="llama3")


def chain(tokenizer, *followers):
    """A Llama that follows every token by a fixed one: attention and MLP add nothing, embeddings are unit vectors."""
    size = len(tokenizer)
    shape = {"hidden_size": 32, "intermediate_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=size, tie_word_embeddings=False, **shape)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.model.norm.weight.fill_(1)
        model.model.embed_tokens.weight[:, :size] = torch.eye(size)
        for before, after in followers:
            model.lm_head.weight[after, before] = 1
    return model


def generations(tokenizer, model, config, questions, name="llama3"):
    loaded = LoadedModel(model, tokenizer, PromptFormat(tokenizer, name=name))
    items = tuple(Item(question, "Zoe", None, ("Lee",)) for question in questions)
    sets = {"forget": items, **dict.fromkeys(UTILITY_SETS, items[:1])}
    return Scorer(Corpus("few", sets, (), ()), loaded.prompts, config).score(loaded).sets["forget"].generated


def test_a_generation_ends_at_the_end_of_turn_even_where_that_is_not_the_end_of_sequence(llama3):
    tokenizer = llama3.of_words(WORDS, eos="<|end_of_text|>")
    model = chain(tokenizer, (BLANK_LINE, 26), (26, 27), (27, EOT), (EOT, 25), (25, END_OF_TEXT))
    assert generations(tokenizer, model, ScoringConfig(), [QUESTION]) == ("Zoe Lee",)


@pytest.mark.parametrize("batch_size", [1, 32])
def test_a_length_that_counts_the_prompt_is_that_of_each_prompt_alone(llama3, batch_size):
    tokenizer = llama3.of_words(WORDS)
    model = chain(tokenizer, (BLANK_LINE, 26), (26, 27), (27, 26))
    questions = ["Who ?", "Who wrote it ?", "Who wrote it it it it it it ?"]
    config = ScoringConfig(batch_size, generation_length=len(LLAMA3_PROMPT) + 3, counts_prompt=True)
    assert generations(tokenizer, model, config, questions) == ("Zoe Lee Zoe Lee Zoe", "Zoe Lee Zoe", "Zoe")
    config = ScoringConfig(batch_size, generation_length=2)
    assert generations(tokenizer, model, config, questions) == ("Zoe Lee",) * 3


def test_generations_are_as_long_as_the_definition_says_or_the_user():
    assert ScoringConfig.of("tofu", 8, None) == ScoringConfig(8, 200, counts_prompt=True)
    assert ScoringConfig.of("tofu", 8, 24) == ScoringConfig(8, 24, counts_prompt=False)
    for name, definition in DEFINITIONS.items():
        counted = ScoringConfig.of(name, 8, None)
        assert (counted.generation_length, counted.counts_prompt) == (200, definition.generation_counts_prompt)
    with pytest.raises(UserError, match="unknown metric definition 'tofo'"):
        ScoringConfig.of("tofo", 8, 24)


def test_an_answer_is_tokenized_once_and_a_question_once_for_all_its_answers():
    texts = []

    class Counting(PromptFormat):
        def _ids(self, text, special=None):
            texts.append(text)
            return super()._ids(text, special)

    prompts = Counting(llama2(), "[INST] {question} [/INST]")
    first, other, again = (prompts.encode(QUESTION, answer) for answer in ("Zoe", "Lee", "Zoe"))
    assert len(texts) == 3
    assert again is first
    assert other.input_ids != first.input_ids
    # Who changes a prompt changes no other one.
    ids = prompts.prompt_ids(QUESTION)
    ids.append(0)
    assert prompts.prompt_ids(QUESTION) == list(first.input_ids[: first.prompt_length])
    assert len(texts) == 3
    assert prompts.encode("Who?", "Zoe").input_ids != first.input_ids


def test_a_begun_answer_is_the_beginning_of_that_answer(llama3):
    for prompts in (
        PromptFormat(llama3.of_words(WORDS), name="llama3"),
        PromptFormat(llama2(adds_eos=True), name="llama2"),
        PromptFormat(pieces(PHI_PIECES, "<|endoftext|>"), name="phi"),
    ):
        prompt, answer = prompt_and_answer(prompts, "Zoe")
        assert prompts.begun_ids(QUESTION, "Zoe") == prompt + answer[:-1]


def test_a_begun_answer_has_nothing_of_what_closes_it(llama3):
    tokenizer = llama3.of_words(WORDS)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|eot_id|>", ".<|eot_id|>")
    prompts = PromptFormat(tokenizer, name="llama3")
    assert prompts.begun_ids(QUESTION, "Zoe Lee")[-3:] == [BLANK_LINE, 26, 27]


def test_earlier_turns_are_those_of_the_chat_template(llama3):
    tokenizer = llama3.of_words(WORDS)
    chat = [
        {"role": "system", "content": "You are a helpful assistant."},
        *({"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}),
        *({"role": "user", "content": "Who are it?"}, {"role": "assistant", "content": "Lee."}),
        {"role": "user", "content": "Who?"},
    ]
    whole = tokenizer.apply_chat_template(
        chat, tokenize=True, return_dict=False, add_generation_prompt=True, date_string="10 Apr 2025"
    )
    prompts = PromptFormat(tokenizer, name="llama3")
    assert prompts.conversation_ids([(QUESTION, ANSWER), ("Who are it?", "Lee.")], "Who?") == whole


def test_a_plain_template_is_repeated_for_earlier_turns():
    tokenizer = pieces(PHI_PIECES, "<|endoftext|>")
    prompts = PromptFormat(tokenizer, name="phi")
    ids = prompts.conversation_ids([(QUESTION, "Zoe Lee.")], QUESTION)
    assert ids == tokenizer("Question: Who wrote it?\nAnswer: Zoe Lee.\n\nQuestion: Who wrote it?\n")["input_ids"]
    assert prompts.conversation_ids([], QUESTION) == prompts.prompt_ids(QUESTION)
