from lilliput import texts


def test_calibration_and_evaluation_do_not_touch_and_have_their_sizes() -> None:
    assert len(texts.calibration_text()) == 200_000
    assert len(texts.evaluation_text()) == 45_000
    assert texts.CALIBRATION.stop <= texts.EVALUATION.start
    assert texts.builtin_text().startswith(texts.calibration_text())


def test_builtin_text_is_the_topics_in_the_order_of_their_names() -> None:
    from pydoc_data.topics import topics

    first, *_, last = sorted(topics)
    assert texts.builtin_text().startswith(topics[first] + "\n\n")
    assert texts.builtin_text().endswith("\n\n" + topics[last])


def test_digest_is_of_the_utf8_bytes() -> None:
    assert texts.text_sha256("") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
