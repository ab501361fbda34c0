"""find_raw_pool: the cases found by file names alone, and the problems it lists."""

import json

import pytest

from nnunet_cfcl.data.pool.find_cases import find_raw_pool, pool_names, read_qualities, silver_names

DATASET = {"channel_names": {"0": "CT", "1": "PET"}, "labels": {"background": 0, "organ": 1}, "file_ending": ".nii.gz"}


@pytest.fixture
def raw(tmp_path):
    for folder in ("imagesTr", "imagesUn", "labelsSilver"):
        (tmp_path / folder).mkdir()
    return tmp_path


def touch(raw, *names):
    for name in names:
        (raw / name).touch()


def test_pool_and_training_cases_get_their_silver_labels_and_keep_their_channels_in_order(raw):
    touch(raw, "imagesTr/t_0000.nii.gz", "imagesTr/t_0001.nii.gz", "imagesTr/v_0000.nii.gz",
          "imagesUn/b_0001.nii.gz", "imagesUn/b_0000.nii.gz", "imagesUn/a_b_0000.nii.gz", "imagesUn/.DS_Store",
          "labelsSilver/b.nii.gz", "labelsSilver/t.nii.gz", "labelsSilver/t.npz")
    found = find_raw_pool(raw, DATASET)
    assert found.problems == []
    assert [(case.name, case.training, [file.name for file in case.images]) for case in found.cases] == [
        ("a_b", False, ["a_b_0000.nii.gz"]), ("b", False, ["b_0000.nii.gz", "b_0001.nii.gz"]),
        ("t", True, ["t_0000.nii.gz", "t_0001.nii.gz"])]
    assert found.cases[0].silver is None
    assert found.cases[1].silver.probabilities is None
    assert found.cases[2].silver.probabilities == raw / "labelsSilver" / "t.npz"


def test_an_output_folder_of_nnunets_predict_command_is_accepted_as_it_is(raw):
    touch(raw, "imagesUn/a_0000.nii.gz", "labelsSilver/a.nii.gz", "labelsSilver/a.npz", "labelsSilver/a.pkl",
          "labelsSilver/dataset.json", "labelsSilver/plans.json", "labelsSilver/predict_from_raw_data_args.json")
    (raw / "labelsSilver" / "chromap").mkdir()
    found = find_raw_pool(raw, DATASET)
    assert found.problems == []
    assert [case.name for case in found.cases] == ["a"]


def test_training_cases_named_in_dataset_json_are_known_too(raw):
    touch(raw, "labelsSilver/x.nii.gz")
    files = {"images": ["elsewhere/x_ct.nii.gz", "elsewhere/x_pet.nii.gz"], "label": "elsewhere/x.nii.gz"}
    found = find_raw_pool(raw, {**DATASET, "dataset": {"x": files}})
    assert found.problems == []
    assert found.cases[0].images == (raw / "elsewhere/x_ct.nii.gz", raw / "elsewhere/x_pet.nii.gz")
    before = found.cases[0].signature()
    (raw / "elsewhere").mkdir()
    touch(raw, "elsewhere/x_ct.nii.gz")
    assert found.cases[0].signature() != before


def test_every_wrong_name_and_missing_counterpart_is_listed(raw):
    touch(raw, "imagesTr/both_0000.nii.gz", "imagesTr/both2_0000.nii.gz", "imagesUn/both_0000.nii.gz",
          "imagesUn/both2_0000.nii.gz", "imagesUn/nochannel.nii.gz", "imagesUn/a_00.nii.gz", "imagesUn/b_0000.nii",
          "imagesUn/late_0001.nii.gz", "imagesUn/gap_0000.nii.gz", "imagesUn/gap_0002.nii.gz",
          "imagesUn/scan_seg_0000.nii.gz", "labelsSilver/lonely.nii.gz", "labelsSilver/orphan.npz",
          "labelsSilver/short.nii", "labelsSilver/notes.txt")
    (raw / "imagesUn" / "subfolder").mkdir()
    lines = find_raw_pool(raw, DATASET).problems
    wanted = ["case both is also in imagesTr", "case both2 is also in imagesTr", "nochannel.nii.gz: must be named",
              "a_00.nii.gz: must be named", "b_0000.nii: must be named", "subfolder: must be named",
              "late_0000.nii.gz: missing", "gap_0001.nii.gz: missing",
              "scan_seg: the name of a case must not end in _seg",
              "lonely.nii.gz: no image of case lonely", "orphan.npz: has no label map orphan.nii.gz",
              "short.nii: a silver label must be named CASE.nii.gz", "notes.txt: a silver label must be named"]
    assert len(lines) == len(wanted)
    for text in wanted:
        assert sum(text in line for line in lines) == 1, text


def test_every_wrong_row_of_the_table_of_qualities_is_listed(tmp_path):
    file, problems = tmp_path / "silver.csv", []
    file.write_text("case,scanner,quality\na,x,0.25\nb,x,good\nc,x,1.5\na,x,0.75\ne,x,nan\nf,x,-0\n")
    found = read_qualities(file, set("abcdef"), ".png", problems)
    assert found == {"a": 0.25, "f": 0}
    wanted = ["line 3: the quality of case b must be a number from 0 to 1, found 'good'",
              "line 4: the quality of case c must be a number from 0 to 1, found '1.5'",
              "line 5: case a has more than one row",
              "line 6: the quality of case e must be a number from 0 to 1, found 'nan'"]
    assert [problem.split("silver.csv ")[1] for problem in problems] == wanted


def test_rows_without_quality_and_rows_of_cases_without_a_label_are_ignored(tmp_path):
    file, problems = tmp_path / "silver.csv", []
    file.write_text("case, quality\n a , 0.5\nb,\n,\n\nunknown,bad\nunknown,0.1\nshort\n")
    assert read_qualities(file, {"a", "b", "c"}, ".png", problems) == {"a": 0.5}
    assert problems == []


@pytest.mark.parametrize(("case", "problem"), [("a.png", "names of files"), ("a_0000", "names of files"),
                                            ("z", "none of the 2 known cases, such as a, but 1 others: z;")])
def test_a_table_with_other_case_names_is_one_problem(tmp_path, case, problem):
    file, problems = tmp_path / "silver.csv", []
    file.write_text(f"case,quality\n{case},0.5\n")
    assert read_qualities(file, {"a", "b"}, ".png", problems) == {}
    assert len(problems) == 1 and problem in problems[0] and str(file) in problems[0]


@pytest.mark.parametrize(("text", "message"), [
    ("case,score\na,1\n", "has no column quality, found case, score"),
    ("", "has no column case and no column quality, found none"),
    ("case;quality\na;1\n", "has no column case and no column quality, found case;quality"),
])
def test_a_table_without_its_columns_is_one_problem(tmp_path, text, message):
    file, problems = tmp_path / "silver.csv", []
    file.write_text(text)
    assert read_qualities(file, {"a"}, ".png", problems) == {}
    assert problems == [f"{file}: {message}"]


def test_the_byte_order_mark_of_a_spreadsheet_is_not_part_of_the_column_name(tmp_path):
    file, problems = tmp_path / "silver.csv", []
    file.write_bytes("case,quality\na,0.5\n".encode("utf-8-sig"))
    assert read_qualities(file, {"a"}, ".png", problems) == {"a": 0.5}
    assert problems == []


def test_the_signature_of_a_case_changes_with_each_of_its_files_and_with_its_quality(raw):
    touch(raw, "imagesUn/a_0000.nii.gz", "labelsSilver/a.nii.gz", "labelsSilver/a.npz")
    signatures = [find_raw_pool(raw, DATASET).cases[0].signature()]
    for name in ("imagesUn/a_0000.nii.gz", "labelsSilver/a.nii.gz", "labelsSilver/a.npz"):
        (raw / name).write_text("x")
        signatures.append(find_raw_pool(raw, DATASET).cases[0].signature())
    (raw / "labelsSilver" / "silver.csv").write_text("case,quality\na,0.5\n")
    signatures.append(find_raw_pool(raw, DATASET).cases[0].signature())
    assert len(set(signatures)) == 5
    assert find_raw_pool(raw, DATASET).cases[0].signature() == signatures[-1]


def test_case_names_are_found_from_file_names_alone(raw):
    touch(raw, "imagesUn/a_0000.nii.gz", "imagesUn/a_0001.nii.gz", "imagesUn/odd", "labelsSilver/b.nii.gz",
          "labelsSilver/plans.json")
    (raw / "dataset.json").write_text(json.dumps(DATASET))
    assert pool_names(raw, ".nii.gz") == {"a"}
    assert silver_names(raw, ".nii.gz") == {"b"}
    assert pool_names(raw / "imagesTr", ".nii.gz") == silver_names(raw / "imagesTr", ".nii.gz") == set()
