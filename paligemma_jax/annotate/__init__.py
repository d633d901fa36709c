"""Many pictures annotated: what is asked about, rows on disk that survive a kill, engines that answer, exports."""
