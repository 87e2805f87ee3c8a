from benchmarks.breakdown import main, part_of


def test_every_part_and_both_numbers_of_threads_are_shown(capsys):
    main(["--lengths", "32"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(", ", 2)[1] for line in lines] == ["HyperGLU"] * 3 + ["softmax"] * 3
    for line in lines[0], lines[1], lines[3], lines[4]:
        assert "operator" in line
        assert "projections" in line
    assert all("two threads: " in lines[i] for i in (2, 5))


def test_operations_are_told_apart():
    assert part_of("hypermlp::native_short_conv_backward") == "convolutions"
    assert part_of("hypermlp::native_backward") == "operator"
    assert part_of("aten::_scaled_dot_product_flash_attention_for_cpu") == "operator"
    assert part_of("aten::addmm") == "projections"
