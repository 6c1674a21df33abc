"""What the rewards that read claim, and the oracle of the words: `pytest rewards`, after
`pip install -r rewards/requirements.txt`."""
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

for package in "rapidocr", "rapidocr_onnxruntime", "onnxruntime", "onnx":     # not in the main requirements
    pytest.importorskip(package)
HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))
import rsaft  # noqa: E402, found through the line above

WORDS = HERE.parent / "tiny" / "words"
rsaft.quiet_libraries()


@pytest.fixture(scope="module")
def world():
    """tiny/words/world.py."""
    return rsaft.import_file(WORDS / "world.py")


@pytest.fixture(scope="module")
def pictures(world):
    """Twelve pictures of words, with noise of 0.02, and their words."""
    words = torch.arange(0, 60, 5)
    return world.sample(words, torch.Generator().manual_seed(0)), [world.WORDS[word] for word in words]


@pytest.fixture(scope="module")
def ocr():
    return rsaft.import_file(HERE / "ocr.py")


@pytest.fixture(scope="module")
def likelihood():
    return rsaft.import_file(HERE / "ocr_likelihood.py")


@pytest.fixture(scope="module")
def recogniser(likelihood):
    return likelihood.recogniser(torch.device("cpu"))


def asked(words):
    return [f'the word "{word}"' for word in words]


def changed(word, letters, count):
    """`word` with its last `count` letters replaced by the next in the alphabet of the world."""
    others = [letters[(letters.index(letter) + 1) % len(letters)] for letter in word]
    return word[:len(word) - count] + "".join(others[len(word) - count:])


# ---- The black box -----------------------------------------------------------------------------------------

def test_edit_distance_counts_what_is_put_in_left_out_or_replaced(ocr):
    for a, b, distance in (("kitten", "sitting", 3), ("", "abc", 3), ("abc", "", 3), ("sale", "sale", 0),
                           ("sale", "ale", 1), ("sale", "seals", 2), ("sunday", "saturday", 3)):
        assert ocr.edit_distance(a, b) == ocr.edit_distance(b, a) == distance


def test_right_letters_is_the_published_formula(ocr):
    # Lower case, no spaces; 1 where the text occurs; the distance is at most the text's length.
    for wanted, read, score in (("SALE", "sale", 1), ("Big SALE", "a bigsale now", 1), ("SALE", "SOLE", 0.75),
                                ("SALE", "", 0), ("SALE", "a long other text", 0), ("SALE", "ALE", 0.75)):
        assert ocr.right_letters(wanted, read) == score


@pytest.mark.parametrize("name", ["ocr", "ocr_v4"])
def test_both_readers_read_lines_and_whole_pictures(name, world, pictures):
    reward, (images, words) = rsaft.make_reward(name), pictures
    assert reward(images, asked(words)).mean() > 0.97
    assert 0.7 < reward(images, asked([changed(word, world.LETTERS, 1) for word in words])).mean() < 0.77
    poster = F.pad(F.interpolate(images[:2], (96, 288)), (0, 0, 150, 42), value=0.8)
    assert reward(poster, ['a poster that says "Area"', 'a sign with "i r e n" on it']).tolist() == [1, 0.5]
    assert reward(torch.full((2, 3, 128, 128), 0.5), asked(words[:2])).tolist() == [0, 0]


@pytest.mark.parametrize("name", ["ocr", "ocr_v4", "ocr_likelihood"])
def test_a_prompt_without_quotes_is_refused_before_anything_loads(name, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text('the word "SALE"\nthe word SALE\n')
    assert rsaft.main(["--tiny", "--eval-reward", name, "--prompts", str(prompts),
                       "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "'the word SALE' has none" in said.err and not said.out


def test_a_missing_package_is_one_line(monkeypatch):
    reading = rsaft.import_file(HERE / "_reading.py")
    with pytest.raises(rsaft.UserError, match="pip install -r rewards/requirements.txt"):
        reading.package_file("no_such_package", "models/x.onnx")
    with pytest.raises(rsaft.UserError, match="pip install -r rewards/requirements.txt"):
        reading.package_file("rapidocr", "models/no_such_file.onnx")


# ---- The likelihood ----------------------------------------------------------------------------------------

@pytest.mark.parametrize("shape", [(2, 3, 48, 144), (1, 3, 48, 320), (3, 3, 48, 97)])
def test_the_module_agrees_with_onnxruntime(shape, likelihood):
    import onnxruntime
    module = likelihood.OnnxModule(likelihood.MODEL)
    session = onnxruntime.InferenceSession(likelihood.MODEL, providers=["CPUExecutionProvider"])
    x = 2 * torch.rand(shape, generator=torch.Generator().manual_seed(0)) - 1
    expected = torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])
    assert_close(module(x), expected, rtol=0, atol=2e-5)
    logits = likelihood.OnnxModule(likelihood.MODEL, logits=True)(x)
    assert_close(logits.softmax(-1), expected, rtol=0, atol=2e-5)


def test_the_torch_recogniser_reads_what_rapidocr_reads(likelihood, recogniser, pictures):
    network, counts_for, numbers = recogniser
    letters = list(numbers)
    read = []
    for best in counts_for[network(likelihood.as_line(pictures[0])).argmax(-1)]:
        read.append("".join(letters[number] for number in best.unique_consecutive()))
    assert read == [word.lower() for word in pictures[1]]


def test_the_ctc_likelihood_is_a_sum_over_all_readings(likelihood):
    # Four columns and the classes blank, a, A, b: every path is listed, and those that read "ab" are summed.
    logits = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counts_for, p, total = torch.tensor([0, 1, 1, 2]), logits.softmax(-1)[0], 0.0
    for path in torch.cartesian_prod(*[torch.arange(4)] * 4):
        read = [number for number in counts_for[path].unique_consecutive().tolist() if number]
        total += p[torch.arange(4), path].prod().item() * (read == [1, 2])
    score = likelihood.ctc_log_likelihood(logits, counts_for, [[1, 2]])
    assert_close(score, torch.tensor([total], dtype=torch.float64).log() / 2)
    assert torch.autograd.gradcheck(lambda x: likelihood.ctc_log_likelihood(x, counts_for, [[1, 2]]),
                                    logits.requires_grad_())


@pytest.mark.parametrize("score", ["log_likelihood", "ocr_floor", "ocr_views"])
def test_the_gradient_agrees_with_finite_differences(score, likelihood, recogniser, pictures, world,
                                                     monkeypatch):
    # In float64, along the gradient and in random directions. The pictures have noise: flat ones sit on ties
    # of the max pooling, where there is no derivative.
    _, *rest = recogniser
    double = likelihood.OnnxModule(likelihood.MODEL, logits=True).double()
    monkeypatch.setattr(likelihood, "recogniser", lambda device: (double, *rest))
    images, (first, second) = pictures[0][:2].double(), pictures[1][:2]
    prompts = asked([first, changed(second, world.LETTERS, 1)])
    reward = getattr(likelihood, score)
    _, gradient = rsaft.reward_gradient(reward, images, prompts)
    generator = torch.Generator().manual_seed(1)
    directions = [gradient, *torch.randn(3, *images.shape, generator=generator, dtype=torch.float64)]
    for direction in directions:
        step = 1e-6 * direction / direction.norm()
        with torch.no_grad():
            slope = (reward(images + step, prompts) - reward(images - step, prompts)).sum() / 2
        assert_close(slope, (gradient * step).sum(), rtol=1e-3, atol=1e-10)


def test_the_likelihood_falls_with_each_wrong_letter(likelihood, pictures, world):
    images, words = pictures
    with torch.no_grad():
        right, one, two, other = (likelihood.log_likelihood(images, asked(
            [changed(word, world.LETTERS, count) for word in words])) for count in (0, 1, 2, 4))
    assert (right > -0.05).all()
    assert (one < right - 1).all() and (two < one - 1).all() and (other < two - 1).all()


def test_case_and_spaces_count_for_nothing(likelihood, pictures):
    images, words = pictures
    with torch.no_grad():
        score = likelihood.log_likelihood(images, asked(words))
        spaced = likelihood.log_likelihood(images, asked([" ".join(word.lower()) for word in words]))
    assert_close(spaced, score)


def test_the_floor_has_the_closed_form(likelihood, pictures, world):
    images, words = pictures
    prompts = asked([changed(word, world.LETTERS, i % 3) for i, word in enumerate(words)])
    with torch.no_grad():
        p = likelihood.log_likelihood(images, prompts).exp()
        floor = likelihood.ocr_floor(images, prompts)
    assert_close(floor, (p + torch.e ** -3).log())


def test_views_are_a_function_of_picture_and_prompt(likelihood, pictures):
    images, prompts = pictures[0][:3], asked(pictures[1][:3])
    views = likelihood.random_views(images, prompts).view(likelihood.VIEWS, *images.shape)
    torch.manual_seed(5)
    alone = likelihood.random_views(images[1:2], prompts[1:2])
    assert_close(views[:, 1], alone, rtol=0, atol=0)                  # whatever it is scored with
    assert (views[0] - views[1]).abs().mean() > 0.02 and (views[0] - images).abs().mean() > 0.02
    with torch.no_grad():                                             # and they can still be read
        assert (likelihood.ocr_views(images, prompts) > -0.1).all()


def test_what_cannot_be_scored_is_refused(likelihood, pictures):
    with pytest.raises(ValueError, match="no room for 'internationalisation'"):
        likelihood.log_likelihood(pictures[0][:1], ['"internationalisation"'])
    with pytest.raises(ValueError, match="doesn't know the letters \u16a0"):
        likelihood.log_likelihood(pictures[0][:1], ['"\u16a0"'])


# ---- The world ---------------------------------------------------------------------------------------------

def test_the_oracle_tells_a_word_from_all_its_rivals(world):
    generator = torch.Generator().manual_seed(3)
    words = torch.arange(len(world.WORDS))
    images = world.sample(words, generator)
    verdict = world.oracle(images, world.PROMPTS)
    assert verdict["accuracy"].all() and (verdict["correlation"] > 0.9).all()
    near = asked([world.rivals(word)[0] for word in world.WORDS])     # one letter of each picture is wrong
    verdict = world.oracle(images, near)
    assert not verdict["accuracy"].any()
    scratches = torch.rand(20, 3, world.HEIGHT, world.WIDTH, generator=generator)
    assert world.oracle_accuracy(scratches, world.PROMPTS[:20]).mean() <= 0.1
    assert world.oracle_correlation(scratches, world.PROMPTS[:20]).max() < 0.3


def test_a_words_rivals_are_its_neighbours_and_the_other_words(world):
    for word in world.WORDS:
        rivals = world.rivals(word)
        near = [other for other in rivals if sum(a != b for a, b in zip(word, other)) == 1]
        assert len(near) >= 36 and word not in rivals and len(set(rivals)) == len(rivals)
        assert set(world.WORDS) <= {word, *rivals} and len(rivals) <= 36 + 59


def test_the_correlation_is_that_of_a_least_squares_fit(world):
    # Not by the oracle's matrix product: one placed rendering at a time, by torch's solver.
    image = world.sample(torch.tensor([7]), torch.Generator().manual_seed(4))[0]
    best = 0.0
    for page in world.renderings("NEST"):
        for dy in range(2 * world.SHIFT_Y + 1):
            for dx in range(2 * world.SHIFT_X + 1):
                mask = page[dy:dy + world.HEIGHT, dx:dx + world.WIDTH].flatten()
                design = torch.stack([torch.ones_like(mask), mask], dim=1).double()
                values = image.flatten(1).T.double()
                rest = values - design @ torch.linalg.lstsq(design, values).solution
                best = max(best, 1 - (rest.square().sum() / (values - values.mean(0)).square().sum()).item())
    assert world.correlations(image, ["NEST"]).item() == pytest.approx(best ** 0.5, abs=1e-4)


def test_every_word_lies_within_the_picture_wherever_it_is_shifted(world):
    for word in {*world.WORDS, *(rival for word in world.WORDS for rival in world.rivals(word))}:
        outside = world.renderings(word).clone()
        outside[:, 2 * world.SHIFT_Y:world.HEIGHT, 2 * world.SHIFT_X:world.WIDTH] = 0
        assert not outside.any(), word


def test_the_oracle_refuses_what_is_not_of_its_world(world):
    with pytest.raises(ValueError, match="can't judge the prompt 'the word \"QUIZ\"'"):
        world.oracle(torch.rand(1, 3, 32, 96), ['the word "QUIZ"'])
    with pytest.raises(ValueError, match="3x32x96, not 3x32x32"):
        world.oracle(torch.rand(1, 3, 32, 32), world.PROMPTS[:1])


def test_the_prompts_are_those_of_the_words(world):
    assert sorted((WORDS / "prompts.txt").read_text().splitlines()) == sorted(world.PROMPTS)
    assert len(set(world.WORDS)) == 60 and set("".join(world.WORDS)) == set(world.LETTERS)


# ---- The model ---------------------------------------------------------------------------------------------

def test_a_sample_size_of_two_numbers_gives_the_pipelines_pictures(world):
    import diffusers
    family, latent_shape, height, width = rsaft.inspect_model(str(WORDS))
    assert (latent_shape, height, width) == ((4, 8, 24), 32, 96)
    model = rsaft.load_model(str(WORDS), 4, 3.0)
    batch, = rsaft.micro_batches(world.PROMPTS[:2], ("test",), 2)
    plan = rsaft.Plan((False,) * 4)
    start, = rsaft.sample_starts(model, plan, [batch], 2)
    with torch.no_grad():
        images, _ = rsaft.sample_images(model, plan, batch, start)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(WORDS, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    expected = pipe(batch.prompts, num_inference_steps=4, guidance_scale=3.0, output_type="pt",
                    latents=batch.noise("xT", latent_shape)).images
    assert images.shape == (2, 3, 32, 96)
    assert_close(images, expected, rtol=0, atol=1e-4)


def test_a_run_on_the_words_is_trained_by_one_reader_and_judged_by_another(tmp_path, capsys):
    oracle = f"{WORDS / 'world.py'}:oracle_accuracy"
    assert rsaft.main(["--tiny", "--model", str(WORDS), "--prompts", str(WORDS / "prompts.txt"),
                       "--reward", "ocr_likelihood", "--eval-reward", "ocr_v4", oracle, "--noise",
                       "--sampling-steps", "3", "--train-steps", "1", "--batch-size", "2",
                       "--eval-images", "4", "--eval-every", "1", "--out", str(tmp_path / "run")]) == 0
    said = capsys.readouterr().out
    for row in "ocr_likelihood (trained on)", "ocr_v4 (held out)", "oracle_accuracy (held out)":
        assert row in said
    assert (tmp_path / "run" / "samples" / "step_000001.png").is_file()
