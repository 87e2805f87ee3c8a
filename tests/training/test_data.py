import pytest
import torch

from hypermlp_lab.training import load_corpus, standard_library


def text_of(tokens):
    return bytes(tokens.tolist())


def test_split_is_by_file_disjoint_and_deterministic(text_folder):
    corpus = load_corpus(text_folder)
    train, validation = set(corpus.train_files), set(corpus.validation_files)
    assert train
    assert validation
    assert not train & validation
    assert len(train | validation) == 40
    assert corpus.train.dtype == torch.uint8
    for part, files in ((corpus.train, corpus.train_files), (corpus.validation, corpus.validation_files)):
        assert text_of(part) == b"".join((text_folder / file).read_bytes() + b"\0" for file in files)
    share = corpus.validation.numel() / (corpus.train.numel() + corpus.validation.numel())
    assert 0.01 < share < 0.06
    again = load_corpus(text_folder)
    assert again.fingerprint() == corpus.fingerprint()
    assert again.validation_files == corpus.validation_files


def test_split_does_not_depend_on_the_folder(text_folder, tmp_path):
    moved = text_folder.rename(tmp_path / "moved")
    assert load_corpus(moved).validation_files == load_corpus(moved).validation_files
    corpus = load_corpus(moved)
    moved.rename(text_folder)
    assert load_corpus(text_folder).fingerprint() == corpus.fingerprint()


def test_skips_tests_hidden_binary_empty_and_repeated_files(text_folder):
    before = load_corpus(text_folder)
    for folder in ("test", "site-packages", "idlelib", "__pycache__", ".hidden"):
        (text_folder / folder).mkdir()
        (text_folder / folder / "no.txt").write_text("not this " * 50)
    (text_folder / "binary.bin").write_bytes(b"\0\1\2" * 100)
    (text_folder / "empty.txt").write_text("\n")
    (text_folder / "zcopy.txt").write_bytes((text_folder / "file3.txt").read_bytes())
    assert load_corpus(text_folder).fingerprint() == before.fingerprint()


def test_single_file_is_cut_in_two(tmp_path):
    file = tmp_path / "book.txt"
    file.write_text("".join(chr(97 + i % 26) for i in range(1000)))
    corpus = load_corpus(file, validation_fraction=0.1)
    assert text_of(corpus.train)[:-1] + text_of(corpus.validation)[:-1] == file.read_bytes()
    assert corpus.validation.numel() == 101


def test_one_huge_file_goes_to_training(tmp_path):
    (tmp_path / "huge.txt").write_text("x" * 9999)
    (tmp_path / "small.txt").write_text("y" * 900)
    assert load_corpus(tmp_path).validation_files == ("small.txt",)


def test_errors(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothere"):
        load_corpus(tmp_path / "nothere")
    with pytest.raises(ValueError, match="no text in"):
        load_corpus(tmp_path)
    (tmp_path / "empty.txt").touch()
    with pytest.raises(ValueError, match="empty"):
        load_corpus(tmp_path / "empty.txt")
    (tmp_path / "image.png").write_bytes(b"\0\0\0\0")
    with pytest.raises(ValueError, match="zero bytes"):
        load_corpus(tmp_path / "image.png")
    with pytest.raises(ValueError, match="validation_fraction"):
        load_corpus(tmp_path, validation_fraction=1.0)


def test_too_little_text_says_so(tmp_path):
    (tmp_path / "a.txt").write_text("short")
    with pytest.raises(ValueError, match=r"training part .* seq_len=16"):
        load_corpus(tmp_path).check_length(16)
    (tmp_path / "b.txt").write_text("long enough to learn from" * 9)
    corpus = load_corpus(tmp_path)
    with pytest.raises(ValueError, match=r"validation part .* has 6 bytes"):
        corpus.check_length(6)
    corpus.check_length(5)


def test_windows_are_text_and_its_successor(text_folder):
    corpus = load_corpus(text_folder)
    inputs, targets = corpus.batch(5, 16, torch.Generator().manual_seed(1))
    assert inputs.shape == targets.shape == (5, 16)
    assert torch.equal(inputs[:, 1:], targets[:, :-1])
    train = text_of(corpus.train)
    assert all(bytes([*x.tolist(), y[-1].item()]) in train for x, y in zip(inputs, targets, strict=True))
    again = corpus.batch(5, 16, torch.Generator().manual_seed(1))
    assert torch.equal(inputs, again[0])


def test_validation_windows_are_fixed_and_do_not_overlap(text_folder):
    corpus = load_corpus(text_folder)
    inputs, _ = corpus.validation_windows(10, 16)
    assert torch.equal(inputs, corpus.validation_windows(10, 16)[0])
    assert len(inputs) == 10
    all_inputs, _ = corpus.validation_windows(10**6, 16)
    assert len(all_inputs) == (corpus.validation.numel() - 1) // 16
    assert text_of(all_inputs.flatten()) == text_of(corpus.validation[: all_inputs.numel()])


def test_standard_library_is_found():
    assert (standard_library() / "os.py").is_file()
