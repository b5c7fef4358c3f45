import sys

from cosmos3_fast.cli.main import main

sys.exit(main())
