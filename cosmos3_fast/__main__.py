import sys

from cosmos3_fast.cli import main

sys.exit(main())
