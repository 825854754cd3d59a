"""What is kept: run, site and trial records, artifacts, migrations, output folders."""
