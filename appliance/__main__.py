"""`python -m appliance`."""

from appliance.cli import main

main(prog_name="python -m appliance")
