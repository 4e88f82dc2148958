//! Conversations from files to batches: orders by seed, packing, places that are saved, and data that is refused. Learning rates.

#[path = "../examples/corpus/mod.rs"]
mod corpus;
mod support;

use std::collections::BTreeSet;

use lowrank_candle::chat::{Answers, Chat, Encoded, Message};
use lowrank_candle::data::{BatchSettings, Batches, Dataset, Encoding, TooLong, read_conversations, write_conversations};
use lowrank_candle::schedule::{Decay, Schedule, Warmup};
use support::{fixture, json_file};

const PLAIN: BatchSettings = BatchSettings { rows: 3, packing: None, epochs: 2, shuffle: Some(7) };

/// Conversation i has the tokens 100·i, 100·i + 1, …; the last half of them are the answer.
fn numbered(lengths: &[usize]) -> Dataset {
    let example = |(i, &length): (usize, &usize)| Encoded {
        ids: (0..length).map(|at| (100 * i + at) as u32).collect(),
        answer: (0..length).map(|at| 2 * at >= length).collect(),
    };
    Dataset::from_examples(lengths.iter().enumerate().map(example).collect()).unwrap()
}

#[test]
fn files_are_read_as_they_were_written() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data.jsonl");
    let said = vec![
        vec![Message::user("a\n\"b\" é"), Message::assistant("c")],
        vec![Message::system(""), Message::user("x"), Message::assistant("y")],
    ];
    write_conversations(&path, &said).unwrap();
    assert_eq!(read_conversations(&path).unwrap(), said);
    let more = r#"{"id": 7, "messages": [{"role": "tool", "content": "1", "name": "sum"}], "tools": null}"#;
    std::fs::write(&path, format!("\n{more}\r\n\n")).unwrap();
    assert_eq!(read_conversations(&path).unwrap()[0][0].more["name"], "sum");
}

#[test]
fn bad_lines_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("data.jsonl");
    let good = r#"{"messages": [{"role": "user", "content": "a"}]}"#;
    for (line, says) in [
        ("{", "EOF"),
        ("[]", "line 3"),
        (r#"{"text": "a"}"#, "missing field `messages`"),
        (r#"{"messages": []}"#, "no messages"),
        (r#"{"messages": [{"role": "user"}]}"#, "missing field `content`"),
        (r#"{"messages": [{"role": "user", "content": null}]}"#, "invalid type: null"),
        (r#"{"messages": [{"role": "user", "content": "a"}], "tools": []}"#, "`tools`"),
    ] {
        std::fs::write(&path, format!("{good}\n\n{line}\n{good}\n")).unwrap();
        let error = read_conversations(&path).unwrap_err().to_string();
        assert!(error.contains("data.jsonl, line 3: ") && error.contains(says) && !error.contains('\n'), "{error}");
    }
    std::fs::write(&path, " \n\n").unwrap();
    assert!(read_conversations(&path).unwrap_err().to_string().contains("no conversation"));
    std::fs::write(&path, [0xff, 0xfe]).unwrap();
    assert!(read_conversations(&path).unwrap_err().to_string().contains("UTF-8"));
}

#[test]
fn long_conversations_are_refused_cut_or_left_out() {
    let chat = Chat::from_dir(fixture("tiny-llama")).unwrap();
    let said =
        [vec![Message::user("a"), Message::assistant("b")], vec![Message::user("a"), Message::assistant(&*"long ".repeat(20))]];
    let encode = |max_len, too_long| Dataset::encode(&chat, &said, &Encoding { answers: Answers::All, max_len, too_long });
    let whole = encode(1000, TooLong::Refuse).unwrap();
    let (short, long) = (whole.examples()[0].ids.len(), whole.examples()[1].ids.len());
    assert!(whole.len() == 2 && short + 20 < long && whole.tokens() == short + long);

    let error = encode(long - 1, TooLong::Refuse).unwrap_err().to_string();
    assert!(error.starts_with("conversation 2: ") && error.contains(&long.to_string()), "{error}");
    assert_eq!(encode(long, TooLong::Refuse).unwrap(), whole);

    let cut = encode(long - 1, TooLong::Truncate).unwrap();
    assert_eq!((cut.len(), cut.truncated(), cut.left_out()), (2, 1, 0));
    assert_eq!(cut.examples()[1].ids, whole.examples()[1].ids[..long - 1]);
    assert_eq!(cut.answer_tokens() + 1, whole.answer_tokens());

    let left = encode(long - 1, TooLong::LeaveOut).unwrap();
    assert_eq!((left.len(), left.truncated(), left.left_out()), (1, 0, 1));

    assert!(encode(5, TooLong::Truncate).unwrap_err().to_string().contains("no token of an answer"));
    assert!(encode(5, TooLong::LeaveOut).unwrap_err().to_string().contains("all of them left out"));
    assert!(encode(1, TooLong::Refuse).is_err());
}

/// A label is the token that follows in the same conversation, where that is of an answer.
#[test]
fn labels_are_the_next_tokens_of_answers() {
    let data = numbered(&[4, 3]);
    let batch = Batches::new(&data, BatchSettings { shuffle: None, ..PLAIN }).unwrap().next().unwrap();
    assert_eq!(batch.tokens.ids(), [0, 1, 2, 3, 100, 101, 102]);
    assert_eq!(batch.tokens.sequences(), [0..4, 4..7]);
    assert_eq!(batch.labels, [None, Some(2), Some(3), None, None, Some(102), None]);
    assert_eq!((batch.counted(), batch.conversations), (3, vec![0, 1]));
}

#[test]
fn every_epoch_has_every_conversation_once_in_an_order_of_its_own() {
    let data = numbered(&[4; 10]);
    let order = |settings| Batches::new(&data, settings).unwrap().map(|batch| batch.conversations).collect::<Vec<_>>();
    let batches = order(PLAIN);
    assert_eq!(batches.iter().map(Vec::len).collect::<Vec<_>>(), [3, 3, 3, 1, 3, 3, 3, 1]);
    assert_eq!(Batches::new(&data, PLAIN).unwrap().total(), 8);
    let (first, second) = (batches[..4].concat(), batches[4..].concat());
    for epoch in [&first, &second] {
        assert_eq!(epoch.iter().copied().collect::<BTreeSet<_>>().len(), 10);
    }
    assert!(first != second && order(BatchSettings { shuffle: Some(8), ..PLAIN }) != batches && order(PLAIN) == batches);
    assert_eq!(order(BatchSettings { shuffle: None, ..PLAIN }).concat(), (0..10).chain(0..10).collect::<Vec<_>>());
}

#[test]
fn packed_rows_are_full_and_never_too_long() {
    let lengths: Vec<usize> = (0..60).map(|i| 2 + (i * 37) % 23).collect();
    let data = numbered(&lengths);
    let settings = BatchSettings { rows: 1, packing: Some(32), epochs: 1, shuffle: Some(1) };
    let rows: Vec<_> = Batches::new(&data, settings).unwrap().collect();
    let sizes: Vec<usize> = rows.iter().map(|row| row.tokens.ids().len()).collect();
    assert!(sizes.iter().all(|&size| size <= 32));
    let (all, least) = (data.tokens(), data.tokens().div_ceil(32));
    assert!(rows.len() <= least + 2, "{} rows for {all} tokens, {least} would do", rows.len());
    let seen: BTreeSet<_> = rows.iter().flat_map(|row| row.conversations.clone()).collect();
    assert_eq!(seen.len(), 60);
    let error = Batches::new(&data, BatchSettings { packing: Some(23), ..settings }).unwrap_err().to_string();
    assert!(error.contains("24 tokens of the longest"), "{error}");
}

/// From every place of a run, what follows is what followed.
#[test]
fn a_run_goes_on_where_it_was() {
    let data = numbered(&[5, 9, 3, 7, 4, 8, 6, 10]);
    for settings in [PLAIN, BatchSettings { rows: 1, packing: Some(12), ..PLAIN }] {
        let mut run = Batches::new(&data, settings).unwrap();
        let all: Vec<_> = run.clone().collect();
        for at in 0..=all.len() {
            let text = serde_json::to_string(&run.position()).unwrap();
            let mut again = Batches::new(&data, settings).unwrap();
            again.seek(serde_json::from_str(&text).unwrap()).unwrap();
            assert_eq!(again.collect::<Vec<_>>(), all[at..]);
            run.next();
        }
        let mut place = run.position();
        let other = numbered(&[5, 9, 3, 7, 4, 8, 6, 11]);
        assert!(Batches::new(&other, settings).unwrap().seek(place).is_err());
        let reseeded = BatchSettings { shuffle: Some(9), ..settings };
        assert!(Batches::new(&data, reseeded).unwrap().seek(place).is_err());
        place.batch += 1;
        assert!(run.seek(place).is_err());
    }
}

#[test]
fn a_part_is_held_back() {
    let data = numbered(&[4; 10]);
    let (train, held) = data.clone().split(0.25, 3).unwrap();
    assert_eq!((train.len(), held.len()), (7, 3));
    let first = |data: &Dataset| data.examples().iter().map(|example| example.ids[0]).collect::<Vec<_>>();
    let all: BTreeSet<_> = first(&train).into_iter().chain(first(&held)).collect();
    assert_eq!(all.len(), 10);
    assert!(first(&train).is_sorted() && first(&held).is_sorted());
    assert_eq!(data.clone().split(0.25, 3).unwrap().1, held);
    for part in [0.0, -0.1, 1.0, f64::NAN] {
        assert!(data.clone().split(part, 3).is_err(), "{part}");
    }
}

#[test]
fn rates_are_those_of_get_scheduler() {
    let fixture = json_file("schedules.json");
    let every = fixture["every"].as_u64().unwrap() as usize;
    for case in fixture["cases"].as_array().unwrap() {
        let (name, steps) = (case["name"].as_str().unwrap(), case["steps"].as_u64().unwrap() as usize);
        let (decay, warmup) = match name {
            "linear" => (Decay::Linear, case["warmup"].as_u64().unwrap()),
            "cosine" => (Decay::Cosine, case["warmup"].as_u64().unwrap()),
            "constant" => (Decay::Constant, 0),
            _ => (Decay::Constant, case["warmup"].as_u64().unwrap()),
        };
        let schedule = Schedule::new(2e-4, steps, Warmup::Steps(warmup as usize), decay).unwrap();
        for (at, rate) in case["rates"].as_array().unwrap().iter().enumerate() {
            let step = if steps < 100 { at } else { at * every };
            let (got, want) = (schedule.rate(step), rate.as_f64().unwrap());
            assert!((got - want).abs() <= 1e-15 * 2e-4f64.max(want), "{name}, step {step} of {steps}: {got}, want {want}");
        }
    }
    let of = |warmup| Schedule::new(1.0, 100, warmup, Decay::Linear);
    assert_eq!(of(Warmup::Ratio(0.025)).unwrap(), of(Warmup::Steps(3)).unwrap());
    assert!(of(Warmup::Ratio(1.5)).is_err() && of(Warmup::Ratio(f64::NAN)).is_err());
    assert!(
        Schedule::new(-1.0, 1, Warmup::default(), Decay::Linear).is_err()
            && Schedule::new(1.0, 0, Warmup::default(), Decay::Linear).is_err()
    );
}

/// Tokens and answers of the conversations that the fixture of transformers' Trainer was made of.
#[test]
fn conversations_are_encoded_as_for_transformers_trainer() {
    let chat = Chat::from_dir(fixture("tiny-llama")).unwrap();
    let said = read_conversations(fixture("sft/data.jsonl")).unwrap();
    let encoding = Encoding { answers: Answers::All, max_len: 512, too_long: TooLong::Refuse };
    let got = Dataset::encode(&chat, &said, &encoding).unwrap();
    let want = json_file("sft/sft.json");
    assert_eq!(got.len(), 10);
    for (got, want) in got.examples().iter().zip(want["examples"].as_array().unwrap()) {
        assert_eq!(serde_json::json!(got.ids), want["ids"]);
        assert_eq!(serde_json::json!(got.answer), want["answer"]);
    }
}

/// The English dialogues of chatterbot-corpus 1.3.3, where `LOWRANK_CHATTERBOT` names their folder: what PyYAML reads.
#[test]
fn chatterbot_corpus_is_what_pyyaml_reads() {
    let Some(folder) = std::env::var_os("LOWRANK_CHATTERBOT") else {
        eprintln!("LOWRANK_CHATTERBOT does not name the folder data/english of chatterbot-corpus 1.3.3: not checked against it");
        return;
    };
    let got = corpus::read_folder(folder.as_ref()).unwrap();
    assert_eq!((got.len(), got.iter().map(Vec::len).sum::<usize>()), (2025, 4288));
    let lines: String = got.iter().map(|turns| serde_json::to_string(turns).unwrap() + "\n").collect();
    assert_eq!(support::sha256(lines.as_bytes()), "ddbe56091ffb3696efee1b6866183c1d1974d2ac8a73cac793edb82d66763cb6");
}

/// Lines of our own in the form of chatterbot-corpus.
#[test]
fn dialogues_of_chatterbot_corpus_are_conversations() {
    let text = "categories:\n- things\nconversations:\n- - What is 6 times 7?\n  - '42'\n- - 'It''s a \"test\"'\n  - Yes, it\n    goes on.\n  - And?\n- - Is it so?\n  - \"true\"\n  - 'Is this: enough?'\n  - \"Yes: it is\"\n- - alone\n";
    let got = corpus::conversations(text).unwrap();
    let said: Vec<Vec<&str>> = got.iter().map(|turns| turns.iter().map(|turn| turn.content.as_str()).collect()).collect();
    assert_eq!(
        said,
        [
            vec!["What is 6 times 7?", "42"],
            vec!["It's a \"test\"", "Yes, it goes on."],
            vec!["Is it so?", "true", "Is this: enough?", "Yes: it is"],
        ]
    );
    assert!(got.iter().all(|turns| turns.iter().enumerate().all(|(at, turn)| turn.role == ["user", "assistant"][at % 2])));
    for (text, says) in [
        ("- a", "no list"),
        ("conversations:\n- a\n- - 42\n  - b", "conversation 2: what is said is no text"),
        ("a: [", "not YAML"),
        ("conversations:\n- - [a]", "no text"),
    ] {
        let error = corpus::conversations(text).unwrap_err();
        assert!(error.contains(says), "{error}");
    }
    let folder = tempfile::tempdir().unwrap();
    assert!(corpus::read_folder(folder.path()).is_err());
    std::fs::write(folder.path().join("b.yml"), text).unwrap();
    assert_eq!(corpus::read_folder(folder.path()).unwrap(), got);
}
