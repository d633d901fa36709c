"""Heat maps, boxes and search by phrases, with the patch ViT: run=heatmap, compare, search or locate."""

from ml_collections import ConfigDict

from paligemma_jax.runs import base


def get_config() -> ConfigDict:
    config = base.common()
    config.run = "heatmap"  # heatmap, compare, search or locate
    config.checkpoint = ""  # compare: a PaliGemma whose image encoder is shown too
    config.dtype = "float32"  # of the PaliGemma
    config.student = base.shipped("patch_vit/student")  # patch ViT: a directory, hub id or .pt file
    config.clip = base.shipped("patch_vit/teacher")  # its teacher: a CLIP in Hugging Face layout, directory or hub id
    config.same_norm = "auto"  # whether patch embeddings get equal norms: on, off, or auto, as the student's file says

    config.image = base.shipped("examples/shapes.png")  # path, URL, folder, or glob in quotes; to be searched: no URL
    config.prompt = "red circle ; star"  # phrases, with " ; " between them
    config.windows = "auto"  # windows along the shorter side, 1 to 8; off: the picture is squeezed; auto: by its size
    config.batch_size = 16  # pictures or windows that are embedded together
    config.format = "text"  # text, or json: one object per line
    config.output = ""  # heatmap: only this file: .png (strip), .gif (film), .npy (maps) or .npz (maps and phrases)
    config.output_dir = "output/phrases"  # folder for pictures and maps

    config.background = ""  # locate: phrases that compete too and are not reported, with " ; " between them
    config.threshold = 0.6  # locate: of the way from a map's mean to its highest, which an object's points are above
    config.min_score = 0.55  # locate: objects with a lower score, 0 to 1, are left out
    config.nms = 0.0  # locate: IoU above which the lower scored of two boxes of a phrase is left out
    config.export = ""  # locate: coco, yolo or both with a comma: files of all objects, in `output_dir`

    config.index = "output/phrases/index.safetensors"  # search: the file that embeddings are kept in
    config.query_image = ""  # search: picture, folder or glob to search with, beside the phrases
    config.top = 5  # search: pictures that are shown for a query
    config.refresh = True  # search: bring the index up to date first; else say only whether it is
    config.overwrite = False  # replace drawings of other settings; search: an index of another folder or other models
    config.ranking = "exact"  # search: exact; for millions of pictures flat or ivf, of faiss
    config.save_every_s = 30.0  # search: seconds between two saves while pictures are embedded
    return config
