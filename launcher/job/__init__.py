"""From the command line of the launcher to what is run: options, plan, environment, checks of the program."""
