"""`qf answer` and `qf chat`, through the library and the command line."""

import io
import json
from dataclasses import replace

import pytest
import torch
from qf import cli
from qf.pipeline.config import ComputeOptions
from qf.pipeline.errors import QfError
from qf.retrieval.dialog import answer, open_chat
from qf.trainer.config import GenerateOptions

ON = ComputeOptions(device="cpu", precision="float32")
PROMPT = "Question: {} Answer:"
ASKED = GenerateOptions(beams=1, max_length=6, prompt=PROMPT)
RED, BLUE = "red-bar-1.png", "blue-pole-1.png"


def test_a_run_of_captions_answers_if_a_prompt_has_a_place_for_the_question(workspace):
    with pytest.raises(QfError, match="answers no questions"):
        answer(workspace, RED, "why?", replace(ASKED, prompt=None), None, ON)
    assert answer(workspace, RED, "what colour is it?", ASKED, None, ON).answer


def test_an_answer_grows(workspace):
    seen = []
    made = answer(workspace, RED, "what is it?", ASKED, None, ON, seen.append)
    assert seen[-1] == made.answer
    assert all(later.startswith(before) for before, later in zip(seen, seen[1:], strict=False))


def test_a_dialog_reads_its_earlier_turns(workspace):
    talk = open_chat(workspace, [RED], ASKED, None, ON)
    first, second = talk.ask("what is it?").answer, talk.ask("how many?").answer
    generator, how = talk.generator, talk.how
    prefix = generator.soft_prompts(talk.image_embeds, [""])
    whole = f"Question: what is it? Answer: {first} Question: how many? Answer:"
    assert generator.continued(prefix, [whole], how) == [second]


def test_a_dialog_forgets_its_oldest_turns_but_never_the_picture(workspace, monkeypatch, caplog):
    talk = open_chat(workspace, [RED], ASKED, None, ON)
    alone = talk.ask("what is it?").answer
    generator = talk.generator
    queries = generator.soft_prompts(talk.image_embeds, [""]).shape[1]
    prompt = generator.language_model.prompt_ids("Question: what is it? Answer:")
    monkeypatch.setattr(generator.language_model, "window", queries + len(prompt) + talk.how.max_length)
    assert talk.ask("what is it?").answer == alone
    assert "oldest turns are left out" in caplog.text
    assert len(talk.turns) == 4
    with pytest.raises(QfError, match="too long"):
        talk.ask("what is it? " * 20)


def test_several_pictures_stand_in_the_order_that_was_asked_for(workspace, pictures):
    file = str(pictures.parent / RED)
    talk = open_chat(workspace, [file, BLUE], ASKED, None, ON)
    assert talk.images == [file, BLUE]
    alone = [open_chat(workspace, [name], ASKED, None, ON).image_embeds for name in (file, BLUE)]
    assert torch.equal(talk.image_embeds, torch.cat(alone))
    assert talk.ask("what are they?").images == [file, BLUE]


def test_nothing_to_talk_about_is_one_line(workspace, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no picture")
    with pytest.raises(QfError, match="none of the pictures can be read"):
        open_chat(workspace, [str(tmp_path)], ASKED, None, ON)


def run(monkeypatch, capsys, *arguments, typed=""):
    monkeypatch.setattr("sys.argv", ["qf", *map(str, arguments), "--device", "cpu"])
    monkeypatch.setattr("sys.stdin", io.StringIO(typed))
    with pytest.raises(SystemExit) as end:
        cli.main()
    captured = capsys.readouterr()
    assert not end.value.code, captured.err
    return captured.out


def test_the_lines_of_the_input_are_questions(workspace, monkeypatch, capsys):
    options = ("-w", workspace.folder, "--prompt", PROMPT, "--max-length", 6, "--json")
    out = run(monkeypatch, capsys, "chat", RED, *options, typed="what is it?\n\nhow many?\n")
    assert [json.loads(line)["question"] for line in out.splitlines()] == ["what is it?", "how many?"]
    assert run(monkeypatch, capsys, "chat", RED, *options) == ""


def test_a_terminal_shows_a_text_while_it_grows(workspace, monkeypatch, capsys):
    options = ("-w", workspace.folder, "--prompt", PROMPT, "--max-length", 6, "--beams", 1)
    whole = run(monkeypatch, capsys, "answer", RED, "what is it?", *options)
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    assert run(monkeypatch, capsys, "answer", RED, "what is it?", *options) == whole
