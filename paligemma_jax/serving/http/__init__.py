"""The HTTP interfaces of a served model: OpenAI's, moondream's and Label Studio's; needs the extra `serve`."""
