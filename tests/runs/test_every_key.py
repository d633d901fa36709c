"""Each key of each config file has a test that shows what another value than the default changes.

The table names it; a new key without one, and a test that does not know its key, are errors. Those of make_tiny have a
single test, which knows them all by their recipe.
"""

import pytest

from tests.covered import unknown

_HERE, _OBJECTS, _GENERATE = "runs/test_options.py", "runs/test_generate_objects.py", "runs/test_generate.py"
_TOLD, _LOADED = (
    f"{_HERE}::test_how_an_answer_is_made_is_told_to_the_model",
    f"{_HERE}::test_what_is_loaded_is_what_the_config_says",
)
_PHRASES, _SEARCHED = "runs/test_phrase_runs.py", "runs/test_search_run.py"
_CHECK = "runs/test_check_run.py"
_TASK = "runs/test_evaluate_task.py"
_FINETUNE, _WATCH = "training/test_finetune_options.py", "training/test_watch.py"
COMMON = {
    "run": "runs/test_command_line.py::test_a_config_for_another_run_is_one_line",
    "checkpoint": _LOADED,
    "hub_id": "runs/test_command_line.py::test_a_local_copy_of_a_published_model_is_used",
    "dtype": _LOADED,
    "platform": f"{_HERE}::test_platform_and_compilation_cache_are_told_to_jax",
    "seed": _TOLD,
    "compilation_cache": f"{_HERE}::test_platform_and_compilation_cache_are_told_to_jax",
}
BASE = COMMON | {
    "quantization": _LOADED,
    "adapter": _LOADED,
    "mesh": _LOADED,
    "resample": f"{_GENERATE}::test_resampling_can_be_chosen",
    "mask_vae": f"{_HERE}::test_masks_are_those_of_the_named_decoder",
    "image": f"{_HERE}::test_the_prompt_and_the_image_are_those_asked_about",
    "video_fps": "runs/test_generate_video.py::test_one_result_per_frame",
    "prompt": f"{_HERE}::test_the_prompt_and_the_image_are_those_asked_about",
    "prompts_file": f"{_GENERATE}::test_folder_with_a_prompts_file",
    "prompt_form": f"{_OBJECTS}::test_classes_are_asked_for_in_another_form",
    "split_classes": f"{_OBJECTS}::test_classes_asked_apart_are_reported_together",
    "max_new_tokens": _TOLD,
    "batch_size": f"{_HERE}::test_answers_are_worked_out_by_batch_size",
    **dict.fromkeys(("temperature", "top_k", "top_p", "min_p", "num_beams", "constrain"), _TOLD),
    "speculate": f"{_HERE}::test_speculate_is_on_off_or_left_to_the_model",
    "format": f"{_GENERATE}::test_json_record",
    "stream": f"{_GENERATE}::test_speculation_can_be_asked_for",
    "min_score": f"{_HERE}::test_objects_of_low_score_or_much_overlap_are_left_out",
    "nms": f"{_HERE}::test_objects_of_low_score_or_much_overlap_are_left_out",
    "export": f"{_OBJECTS}::test_coco_files",
    "output_dir": f"{_GENERATE}::test_boxes_and_masks_are_drawn_and_listed",
    "resume": "runs/test_folder.py::test_a_finished_run_has_nothing_to_go_on_with",
    "overwrite": "runs/test_folder.py::test_overwriting_leaves_nothing_of_the_other_run_and_all_that_is_not_its_own",
    "save_embeddings": "runs/test_embedded.py::test_saved_is_what_the_pictures_gave_and_answered_what_was_loaded",
    "load_embeddings": "runs/test_embedded.py::test_saved_is_what_the_pictures_gave_and_answered_what_was_loaded",
    "embeddings": "runs/test_embedded.py::test_what_was_saved_stands_for_its_picture",
    "profile": f"{_GENERATE}::test_a_profile_is_written_and_announced",
    "loc_scale": f"{_HERE}::test_loc_scale_is_the_far_edge",
    **dict.fromkeys(("measure", "data", "num_scenes", "scenes_seed"), f"{_HERE}::test_measure_is_answers_or_pointing"),
    "output": "runs/test_evaluate.py::test_prints_a_table_and_writes_json",
}
_MAPS, _SWAP = (
    "runs/test_inspect.py::test_only_what_is_asked_for",
    "runs/test_embedded.py::test_four_runs_and_their_variations",
)
_SERVE, _UI = "runs/test_serve.py", "runs/test_ui.py"
_RUN = "runs/test_annotate_run.py"
_RAY = "annotate/test_kill.py::test_ray_makes_the_same_rows_and_either_engine_goes_on"
_SAME = f"{_RUN}::test_what_is_loaded_is_what_the_config_says"
_KEPT = f"{_RUN}::test_objects_are_kept_as_the_config_says"
_BATCHES, _TABLE = f"{_RUN}::test_batches_threads_and_shards", f"{_RUN}::test_inputs_of_a_table"
ANNOTATE = COMMON | {
    **dict.fromkeys(("checkpoint", "dtype", "quantization", "adapter", "mask_vae", "resample", "hub_id"), _SAME),
    **dict.fromkeys(
        ("temperature", "top_k", "top_p", "min_p", "num_beams", "seed", "max_new_tokens", "speculate", "constrain"),
        f"{_RUN}::test_how_an_answer_is_made_is_told_to_the_model",
    ),
    **dict.fromkeys(("min_score", "nms", "loc_scale"), _KEPT),
    **dict.fromkeys(("batch_size", "threads", "shard_size", "shard_format"), _BATCHES),
    **dict.fromkeys(("image", "image_column", "image_root"), _TABLE),
    **dict.fromkeys(
        ("prompts_file", "prompt_form", "split_classes"), f"{_RUN}::test_prompts_and_their_parts_have_rows_each"
    ),
    **dict.fromkeys(
        ("prompt", "overwrite"), f"{_RUN}::test_another_run_in_the_folder_is_refused_before_the_model_is_loaded"
    ),
    "output_dir": _KEPT,
    "export": f"{_RUN}::test_exports_are_made_at_the_end",
    "retry_failed": f"{_RUN}::test_failed_pictures_are_asked_about_again_only_when_told",
    "profile": f"{_RUN}::test_a_profile_is_written",
    **dict.fromkeys(("engine", "workers"), _RAY),
}
COVERED = {
    "tiny": BASE,
    "annotate": ANNOTATE,
    "evaluate": COMMON
    | dict.fromkeys(
        ("checkpoint", "dtype", "quantization", "mask_vae"), f"{_TASK}::test_what_is_loaded_is_what_the_config_says"
    )
    | dict.fromkeys(("max_new_tokens", "num_beams", "batch_size"), f"{_TASK}::test_how_answers_are_made")
    | dict.fromkeys(("split", "limit", "metric", "prompt"), f"{_TASK}::test_limit_split_metric_and_prompt")
    | dict.fromkeys(("seed", "resamples"), f"{_TASK}::test_seed_and_resamples_are_those_of_the_interval")
    | dict.fromkeys(("task", "data", "loc_scale"), f"{_TASK}::test_loc_scale_is_the_far_edge")
    | {
        "adapter": f"{_TASK}::test_an_adapter_must_be_there",
        "resample": f"{_TASK}::test_resampling_can_be_chosen",
        "format": f"{_TASK}::test_json_without_a_folder",
        "output_dir": f"{_TASK}::test_a_table_records_and_a_result",
        "overwrite": f"{_TASK}::test_other_settings_are_refused_until_the_folder_may_begin_anew",
    },
    "inspect": BASE
    | {
        "answer": "runs/test_inspect.py::test_every_map_is_written_as_a_picture_and_a_plain_array",
        "report": "runs/test_inspect.py::test_every_map_is_written_as_a_picture_and_a_plain_array",
        **dict.fromkeys(("maps", "layer", "head"), _MAPS),
        "text": "runs/test_inspect.py::test_the_text_of_the_similarity",
        "words": f"{_HERE}::test_words_is_how_many_are_named",
        **dict.fromkeys(("occlusion_size", "occlusion_way"), f"{_HERE}::test_occlusion_hides_as_it_is_told"),
        "embeddings_file": "runs/test_inspect.py::test_a_file_of_embeddings_needs_no_model",
    },
    "swap": BASE | dict.fromkeys(("other_image", "box", "mix", "bits"), _SWAP),
    "serve": COMMON
    | dict.fromkeys(
        ("checkpoint", "adapter", "dtype", "quantization", "mask_vae", "mesh", "num_slots"),
        f"{_SERVE}::test_what_is_loaded_and_for_how_many",
    )
    | dict.fromkeys(
        ("max_waiting", "max_new_tokens", "max_prompt_tokens", "max_images", "cache_bytes", "num_steps"),
        f"{_SERVE}::test_what_the_engine_is_told",
    )
    | dict.fromkeys(
        (
            *("seed", "model_name", "loc_scale", "trusted_proxies", "host", "max_body_bytes", "max_pixels", "max_n"),
            *("requests_per_minute", "body_timeout_s", "request_timeout_s", "drain_s"),
        ),
        f"{_SERVE}::test_what_the_server_is_told",
    )
    | dict.fromkeys(("image_hosts", "cors_origins"), f"{_SERVE}::test_names_with_commas")
    | dict.fromkeys(("api_key", "api_key_file"), f"{_SERVE}::test_keys")
    | {
        "port": f"{_SERVE}::test_what_cannot_be_is_one_line",
        "resample": f"{_SERVE}::test_resample_is_that_of_the_model",
    },
    "ui": COMMON
    | dict.fromkeys(
        ("checkpoint", "adapter", "dtype", "quantization", "mask_vae", "num_slots"),
        f"{_UI}::test_what_is_loaded_and_for_how_many",
    )
    | dict.fromkeys(("resample", "loc_scale"), f"{_UI}::test_the_source_is_told_to_the_calls")
    | dict.fromkeys(
        ("max_waiting", "max_new_tokens", "max_prompt_tokens", "cache_bytes", "num_steps"),
        f"{_UI}::test_what_the_engine_is_told",
    )
    | dict.fromkeys(("server", "api_key"), f"{_UI}::test_a_server_is_asked_instead")
    | dict.fromkeys(("host", "share"), f"{_UI}::test_models_are_chosen_only_where_nobody_else_comes")
    | dict.fromkeys(("simple", "image", "seed"), f"{_UI}::test_which_page_is_made")
    | dict.fromkeys(("student", "clip"), f"{_UI}::test_phrases_are_shown_by_the_pair_that_is_named")
    | {"port": f"{_UI}::test_what_cannot_be_is_one_line"},
    "patch_vit": COMMON
    | dict.fromkeys(("checkpoint", "dtype"), f"{_PHRASES}::test_a_paligemma_is_shown_beside_it")
    | dict.fromkeys(("student", "clip"), f"{_PHRASES}::test_models_in_the_wrong_place_are_one_line")
    | dict.fromkeys(
        ("batch_size", "format", "image", "prompt"), f"{_PHRASES}::test_several_pictures_in_batches_of_any_size"
    )
    | dict.fromkeys(("threshold", "background", "min_score", "nms"), f"{_PHRASES}::test_options_of_locate_decide")
    | {
        "same_norm": f"{_PHRASES}::test_the_same_norm_of_the_student_can_be_set",
        "windows": f"{_PHRASES}::test_windows_make_finer_maps",
        "output": f"{_PHRASES}::test_one_file_if_only_that_is_wanted",
        "output_dir": f"{_PHRASES}::test_a_heat_map_is_drawn_filmed_and_saved",
        "export": f"{_PHRASES}::test_boxes_and_masks_have_the_keys_of_detect",
        "index": f"{_SEARCHED}::test_a_damaged_index_is_refused_until_it_may_be_made_again",
        **dict.fromkeys(("query_image", "top"), f"{_SEARCHED}::test_phrases_and_pictures_find_what_they_name"),
        "refresh": f"{_SEARCHED}::test_an_index_follows_its_folder_and_says_so",
        "overwrite": f"{_SEARCHED}::test_an_index_of_another_folder_is_refused_until_it_may_become_one",
        "ranking": f"{_SEARCHED}::test_faiss_ranks_alike",
        "save_every_s": f"{_SEARCHED}::test_saving_as_often_as_told",
    },
    "check": COMMON
    | dict.fromkeys(("checkpoint", "mask_vae"), f"{_CHECK}::test_codes_need_the_named_vae")
    | dict.fromkeys(("image_root", "data_format"), f"{_CHECK}::test_where_pictures_are_and_what_the_data_are")
    | dict.fromkeys(
        ("output_dir", "preview", "num_preview", "data_task", "augment", "seed"),
        f"{_CHECK}::test_the_report_and_the_preview_are_files",
    )
    | dict.fromkeys(("data", "val_data", "format"), f"{_CHECK}::test_the_same_picture_twice_and_in_two_splits")
    | {"text_length": f"{_CHECK}::test_classes_are_counted"},
    "finetune": COMMON
    | dict.fromkeys(
        ("learning_rate", "warmup_fraction", "weight_decay", "b2", "clip_norm"),
        f"{_FINETUNE}::test_the_optimizer_is_that_of_the_recipe",
    )
    | dict.fromkeys(("data", "image_root", "epochs", "batch_size", "text_length", "seed"), f"{_FINETUNE}::test_batches")
    | dict.fromkeys(
        ("output_dir", "log_every", "save_every", "save_minutes", "overwrite"), f"{_FINETUNE}::test_the_loop"
    )
    | dict.fromkeys(
        ("schedule", "lr_multipliers", "decayed", "b1", "dropout", "ema", "log"), f"{_WATCH}::test_keys_are_told"
    )
    | dict.fromkeys(
        ("val_data", "val_every", "val_examples", "metric", "patience"), f"{_WATCH}::test_the_rule_is_that_of_the_keys"
    )
    | {"keep_best": f"{_WATCH}::test_the_best_is_kept"}
    | dict.fromkeys(("data_format", "data_task", "augment", "data_threads"), f"{_FINETUNE}::test_how_data_are_read")
    | {"mesh": f"{_FINETUNE}::test_a_mesh"}
    | dict.fromkeys(("coordinator", "num_processes", "process_id"), f"{_FINETUNE}::test_processes_are_joined")
    | {"check_pictures": f"{_FINETUNE}::test_pictures_are_checked_before"}
    | {"label_smoothing": f"{_FINETUNE}::test_the_loss", "dtype": f"{_FINETUNE}::test_the_weights"}
    | dict.fromkeys(
        ("method", "trainable", "freeze", "lora_targets", "use_dora", "quantization"), f"{_FINETUNE}::test_what_trains"
    )
    | dict.fromkeys(("lora_rank", "lora_alpha", "use_rslora"), f"{_FINETUNE}::test_adapters")
    | dict.fromkeys(("accumulate", "remat"), f"{_FINETUNE}::test_memory_is_saved")
    | {"verify": f"{_FINETUNE}::test_the_answers_are_compared_if_that_is_asked"},
}


@pytest.mark.parametrize("name", COVERED)
def test_every_key_has_a_test_that_knows_it(name, main, monkeypatch):
    """The test exists, and names the key."""
    seen = []
    for run in ("annotate", "check", "evaluate", "generate", "heatmap", "inspect", "swap", "train", "serve", "ui"):
        monkeypatch.setattr(f"paligemma_jax.runs.{run}.run", lambda config: seen.append(set(config)) or 0)
    assert main(f"--config=configs/{name}.py", "--config.compilation_cache=false")[0] == 0
    assert seen == [set(COVERED[name])]
    assert not unknown(COVERED[name])


@pytest.mark.parametrize("name", ["mix224", "mix448", "pt224", "pt448", "pt896"])
def test_configs_of_published_models_have_the_same_keys(name, main, monkeypatch):
    seen = []
    monkeypatch.setattr("paligemma_jax.runs.generate.run", lambda config: seen.append(set(config)) or 0)
    assert main(f"--config=configs/{name}.py", "--config.compilation_cache=false")[0] == 0
    assert seen == [set(COVERED["tiny"])]
