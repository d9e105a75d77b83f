"""Task definitions of lm-evaluation-harness for local files, one YAML file each; `utils` reads the files."""
