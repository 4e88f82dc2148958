//! Rendered templates, token ids and masks of answers against transformers, and templates and folders that are refused.

use std::collections::BTreeMap;

use lowrank_candle::chat::{Answers, Chat, Message};
use lowrank_candle::gguf::Gguf;
use serde_json::Value;
use tokenizers::Tokenizer;

mod support;

use support::{fixture, json_file, smollm2};

fn tiny(template: &str) -> Chat {
    let special: BTreeMap<String, String> = serde_json::from_value(json_file("chat.json")["special"].clone()).unwrap();
    let tokenizer = Tokenizer::from_file(fixture("tiny-llama/tokenizer.json")).unwrap();
    Chat::new(tokenizer, template, special).unwrap()
}

fn messages(value: &Value) -> Vec<Message> {
    serde_json::from_value(value.clone()).unwrap()
}

fn ids(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

/// Each template with each conversation: the text, or the refusal of the template's own.
#[test]
fn templates_are_rendered_as_transformers_does() {
    let fixture = json_file("chat.json");
    let now = fixture["now"].as_str().unwrap();
    for case in fixture["cases"].as_array().unwrap() {
        let name = case["template"].as_str().unwrap();
        let chat = tiny(fixture["templates"][name].as_str().unwrap()).with_date(now).unwrap();
        let (said, answer) = (messages(&case["messages"]), case["add_generation_prompt"].as_bool().unwrap());
        match (chat.render(&said, answer), case["text"].as_str()) {
            (Ok(got), Some(want)) => {
                assert_eq!(got, want, "{name}, {said:?}");
                assert_eq!(chat.ids(&got).unwrap(), ids(&case["ids"]), "{name}");
            }
            (Err(error), None) => {
                let want = format!("chat template: {}", case["error"].as_str().unwrap());
                assert_eq!(error.to_string(), want, "{name}");
            }
            (got, want) => panic!("{name}, {said:?}: {got:?}, want {want:?}"),
        }
    }
}

/// Where a template marks answers, they are the tokens that transformers marks.
#[test]
fn marked_answers_are_those_of_transformers() {
    let fixture = json_file("chat.json");
    let cases = fixture["cases"].as_array().unwrap().iter().filter(|case| case["mask"].is_array());
    let mut compared = 0;
    for case in cases {
        let chat = tiny(fixture["templates"]["marked"].as_str().unwrap());
        let said = messages(&case["messages"]);
        if said.last().unwrap().role != "assistant" {
            continue;
        }
        let got = chat.encode(&said, Answers::All).unwrap();
        assert_eq!(got.ids, ids(&case["ids"]));
        let mask: Vec<u32> = got.answer.iter().map(|&answer| answer.into()).collect();
        assert_eq!(mask, ids(&case["mask"]), "{said:?}");
        compared += 1;
    }
    assert!(compared >= 2, "only {compared} conversations");
}

/// Without marks: the prompt before each answer, tokenised by itself, is where the answer begins.
#[test]
fn answers_are_what_follows_the_prompts() {
    let chat = Chat::from_dir(fixture("tiny-llama")).unwrap();
    let said = [
        Message::system("Short."),
        Message::user("How are you?"),
        Message::assistant("I am fine."),
        Message::user("1 + 1?"),
        Message::assistant("2"),
    ];
    let got = chat.encode(&said, Answers::All).unwrap();
    assert_eq!(got.ids, chat.ids(&chat.render(&said, false).unwrap()).unwrap());
    let answers: Vec<String> = got
        .answer
        .chunk_by(|a, b| a == b)
        .scan(0, |at, run| {
            let tokens = &got.ids[*at..*at + run.len()];
            *at += run.len();
            Some((run[0], chat.ids("").unwrap().into_iter().chain(tokens.iter().copied()).collect::<Vec<_>>()))
        })
        .filter(|(answer, _)| *answer)
        .map(|(_, tokens)| chat.text(&tokens).unwrap())
        .collect();
    assert_eq!(answers, ["I am fine.\n", "2\n"]);
    let prompt = chat.prompt(&said[..2]).unwrap();
    assert_eq!(got.answer.iter().position(|&answer| answer), Some(prompt.len()));
    assert_eq!(got.ids[..prompt.len()], prompt);

    let last = chat.encode(&said, Answers::Last).unwrap();
    assert_eq!(last.ids, got.ids);
    assert_eq!(last.answer.iter().position(|&answer| answer), Some(chat.prompt(&said[..4]).unwrap().len()));
    assert_eq!(chat.stops(), [2]);
}

/// The space that ends the prompt and the word that begins the answer are one token: that token is the prompt's.
#[test]
fn a_token_over_the_boundary_is_prompt() {
    let chat =
        tiny("{% for m in messages %}{{ m.role[0] + ': ' + m.content }}{% endfor %}{% if add_generation_prompt %}a: {% endif %}");
    let said = [Message::user("x"), Message::assistant("the sea")];
    let got = chat.encode(&said, Answers::All).unwrap();
    let the = chat.ids(" the").unwrap();
    assert_eq!(the.len(), 1, "the vocabulary has ` the`");
    let at = got.ids.iter().position(|id| *id == the[0]).unwrap();
    assert!(got.answer.iter().enumerate().all(|(i, &answer)| answer == (i > at)));
}

/// Earlier answers that are rendered in another way once messages follow, and prompts that an answer does not follow.
#[test]
fn unstable_templates_are_refused_and_last_answers_are_not() {
    let chat = tiny(
        "{% for m in messages %}{{ m.role }}:{{ m.content if loop.last else m.content[:1] }};{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}",
    );
    let said = |turns: usize| {
        [("user", "ab"), ("assistant", "cd")].into_iter().cycle().take(turns).map(|(r, c)| Message::new(r, c)).collect::<Vec<_>>()
    };
    let error = chat.encode(&said(4), Answers::All).unwrap_err().to_string();
    assert!(error.contains("message 2") && error.contains("last answers alone"), "{error}");
    let chat = tiny(
        "{% for m in messages %}{{ m.role }}:{{ m.content }};{% endfor %}{% if add_generation_prompt %}assistant: think{% endif %}",
    );
    let error = chat.encode(&said(2), Answers::All).unwrap_err().to_string();
    assert!(error.contains("is not how the answered text begins"), "{error}");
    let chat = tiny(
        "{% for m in messages %}{% if m.role == 'user' and not loop.last %}{{ m.content[:1] }}{% else %}{{ m.content }}{% endif %}|{% endfor %}",
    );
    assert!(chat.encode(&said(2), Answers::All).is_err());

    let chat = Chat::from_dir(fixture("tiny-llama")).unwrap();
    for (turns, answers, says) in [
        (vec![Message::user("a")], Answers::All, "no answer"),
        (vec![Message::user("a")], Answers::Last, "not the assistant's"),
        (vec![Message::assistant("a")], Answers::All, "answers nothing"),
        (vec![], Answers::All, "not the assistant's"),
    ] {
        let error = chat.encode(&turns, answers).unwrap_err().to_string();
        assert!(error.contains(says), "{error}");
    }
}

#[test]
fn what_is_saved_is_read_again() {
    let chat = Chat::from_gguf(&Gguf::open(fixture("tiny-llama.gguf")).unwrap()).unwrap();
    let folder = tempfile::tempdir().unwrap();
    chat.save(folder.path()).unwrap();
    let again = Chat::from_dir(folder.path()).unwrap();
    let said = [Message::user("What is the name of the river 12?"), Message::assistant("é \n")];
    assert_eq!(again.encode(&said, Answers::All).unwrap(), chat.encode(&said, Answers::All).unwrap());
    assert_eq!(again.stops(), chat.stops());
    assert_eq!(
        Chat::from_dir(fixture("tiny-llama")).unwrap().encode(&said, Answers::All).unwrap(),
        chat.encode(&said, Answers::All).unwrap()
    );
}

#[test]
fn bad_folders_and_templates_are_refused_in_one_line() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |says: &str| {
        let error = Chat::from_dir(folder.path()).unwrap_err().to_string();
        assert!(error.contains(says) && !error.contains('\n'), "{error}");
    };
    refused("tokenizer.json");
    std::fs::write(folder.path().join("tokenizer.json"), "{}").unwrap();
    refused("not a tokenizer");
    std::fs::copy(fixture("tiny-llama/tokenizer.json"), folder.path().join("tokenizer.json")).unwrap();
    refused("has none: neither chat_template.jinja");
    std::fs::write(folder.path().join("tokenizer_config.json"), "[").unwrap();
    refused("not a JSON object");
    let named = r#"{"chat_template": [{"name": "tool_use", "template": "x"}, {"name": "default", "template": "{% if %}"}]}"#;
    std::fs::write(folder.path().join("tokenizer_config.json"), named).unwrap();
    refused("chat template: syntax error");
    std::fs::write(folder.path().join("chat_template.jinja"), "{{ messages }}").unwrap();
    let chat = Chat::from_dir(folder.path()).unwrap();
    let error = chat.render(&[Message::user("a")], false).unwrap_err().to_string();
    assert!(error.contains("tojson"), "{error}");
    assert!(chat.with_date("yesterday").unwrap_err().to_string().contains("2024-07-26"));
}

/// The real file, where it is.
#[test]
fn smollm2_speaks_as_in_transformers() {
    let Some(path) = smollm2() else { return };
    let chat = Chat::from_gguf(&Gguf::open(path).unwrap()).unwrap();
    for case in json_file("smollm2.json")["chats"].as_array().unwrap() {
        let text = chat.render(&messages(&case["messages"]), case["add_generation_prompt"].as_bool().unwrap()).unwrap();
        assert_eq!(text, case["text"].as_str().unwrap());
        assert_eq!(chat.ids(&text).unwrap(), ids(&case["ids"]));
    }
}
