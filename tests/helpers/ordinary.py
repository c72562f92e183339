"""Define ordinary programs, as a model may generate them, which run in the sandbox as elsewhere.

Also those that the sandbox refuses on purpose, with the exception; the reasons are in
docs/sandbox.md.
"""

ALLOWED = {
    # files
    "a named temporary file": (
        "import tempfile\nwith tempfile.NamedTemporaryFile('w+') as f:\n"
        "    f.write('x'); f.flush(); assert open(f.name).read() == 'x'"
    ),
    "temporary files without a name": (
        "import tempfile\nfor kind in (tempfile.TemporaryFile, tempfile.SpooledTemporaryFile):\n"
        "    with kind(mode='w+') as f: f.write('x'); f.seek(0); assert f.read() == 'x'"
    ),
    "copies with modes and times": (
        "import os, shutil\nos.mkdir('d'); open('d/a', 'w').write('x')\n"
        "shutil.copy('d/a', 'b'); shutil.copy2('d/a', 'c'); shutil.copytree('d', 'e')\n"
        "assert open('b').read() == open('c').read() == open('e/a').read() == 'x'\n"
        "shutil.rmtree('d')"
    ),
    "moves between folders": (
        "import os, pathlib, shutil\nos.mkdir('d'); os.mkdir('e'); open('a', 'w').write('x')\n"
        "shutil.move('a', 'd/a'); shutil.move('d', 'e'); os.chdir('e')\n"
        "pathlib.Path('d/a').touch(); assert open('d/a').read() == 'x'"
    ),
    "a mapped file": (
        "import mmap\nopen('a', 'wb').write(bytes(4096))\n"
        "with open('a', 'r+b') as f, mmap.mmap(f.fileno(), 0) as m: m[0] = 1\n"
        "assert open('a', 'rb').read()[0] == 1"
    ),
    "archives": (
        "import tarfile, zipfile\nopen('a', 'w').write('x')\n"
        "with zipfile.ZipFile('a.zip', 'w') as z: z.write('a')\n"
        "with tarfile.open('a.tar', 'w') as t: t.add('a')\n"
        "zipfile.ZipFile('a.zip').extractall('z'); tarfile.open('a.tar').extractall('t')\n"
        "assert open('z/a').read() == open('t/a').read() == 'x'"
    ),
    "a database": (
        "import sqlite3\nwith sqlite3.connect('a.db') as c:\n    c.execute('create table t(x)')\n"
        "    c.execute('insert into t values (1)')\n"
        "assert c.execute('select * from t').fetchall() == [(1,)]"
    ),
    "csv, json, pickle and logs": (
        "import csv, json, logging, pickle\nlogging.basicConfig(filename='l')\n"
        "logging.warning('x'); csv.writer(open('a', 'w')).writerow([1])\n"
        "json.dump(1, open('b', 'w'))\n"
        "assert pickle.loads(pickle.dumps({1: [2]})) == {1: [2]} and open('l').read()"
    ),
    # threads, and waiting
    "a hundred threads": (
        "import threading\nbarrier = threading.Barrier(100); found = []\n"
        "def work(n): barrier.wait(); found.append(str(n) * 10**5)\n"
        "threads = [threading.Thread(target=work, args=(n,)) for n in range(100)]\n"
        "[t.start() for t in threads]; [t.join() for t in threads]; assert len(found) == 100"
    ),
    "a pool of threads": (
        "from concurrent.futures import ThreadPoolExecutor, as_completed\n"
        "with ThreadPoolExecutor(32) as pool: assert sum(pool.map(abs, range(-9, 9))) == 81"
    ),
    "asyncio": (
        "import asyncio\nasync def main():\n"
        "    got = await asyncio.gather(*[asyncio.sleep(0.01, n) for n in range(5)])\n"
        "    return sum(got) + await asyncio.to_thread(sum, [1, 2])\n"
        "assert asyncio.run(main()) == 13"
    ),
    "a pair of sockets": (
        "import socket\na, b = socket.socketpair(); a.sendall(b'x'); assert b.recv(9) == b'x'"
    ),
    "queues, locks and events": (
        "import queue, threading\nq = queue.Queue(); e = threading.Event()\n"
        "threading.Timer(0.01, lambda: (q.put(1), e.set())).start(); e.wait()\n"
        "assert q.get() == 1 and threading.Lock().acquire(timeout=1)"
    ),
    "an alarm": (
        "import signal, time\ndef ring(*_): raise TimeoutError\n"
        "signal.signal(signal.SIGALRM, ring); signal.setitimer(signal.ITIMER_REAL, 0.05)\n"
        "try: time.sleep(9); assert False\nexcept TimeoutError: pass"
    ),
    "deep recursion on a large stack": (
        "import resource, sys, threading\n"
        "hard = resource.getrlimit(resource.RLIMIT_STACK)[1]\n"
        "resource.setrlimit(resource.RLIMIT_STACK, (2**23, hard))\n"
        "sys.setrecursionlimit(10**6); threading.stack_size(2**27); found = []\n"
        "def depth(n): return n and 1 + depth(n - 1)\n"
        "t = threading.Thread(target=lambda: found.append(depth(20000))); t.start(); t.join()\n"
        "assert found == [20000]"
    ),
    # computing
    "decimals and fractions": (
        "import decimal, fractions\ndecimal.getcontext().prec = 50\n"
        "assert str(decimal.Decimal(2).sqrt())[:8] == '1.414213'\n"
        "assert fractions.Fraction('1/3') + fractions.Fraction(1, 6) == fractions.Fraction(1, 2)"
    ),
    "dataclasses, enums and types": (
        "import abc, dataclasses, enum, typing\n@dataclasses.dataclass(order=True)\n"
        "class P:\n    x: int\n    y: typing.Optional[int] = None\n"
        "assert sorted([P(2), P(1)])[0] == P(1) and enum.Enum('E', 'A B').A.value == 1"
    ),
    "caches and reductions": (
        "import functools, operator\n@functools.lru_cache(None)\n"
        "def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)\n"
        "assert fib(90) == 2880067194370816120\n"
        "assert functools.reduce(operator.mul, range(1, 6)) == 120"
    ),
    "collections, heaps and bisection": (
        "import bisect, collections, heapq\nassert collections.Counter('aab')['a'] == 2\n"
        "assert heapq.nsmallest(2, [3, 1, 2]) == [1, 2] and bisect.bisect([1, 3], 2) == 1\n"
        "assert collections.deque([1, 2], 1)[0] == 2 and collections.OrderedDict(a=1) == {'a': 1}"
    ),
    "iterators": (
        "import itertools, string\nassert len(list(itertools.permutations(range(5)))) == 120\n"
        "assert ''.join(itertools.islice(string.ascii_lowercase, 3)) == 'abc'"
    ),
    "regular expressions and text": (
        "import difflib, re, textwrap, unicodedata\n"
        "assert re.sub(r'(\\w)\\1', '-', 'aab') == '-b'\n"
        "assert unicodedata.name('é').startswith('LATIN') and len(textwrap.wrap('a b', 1)) == 2"
    ),
    "dates and zones": (
        "import calendar, datetime, time, zoneinfo\n"
        "noon = datetime.datetime(2024, 7, 1, 12, tzinfo=zoneinfo.ZoneInfo('UTC'))\n"
        "assert (noon + datetime.timedelta(1)).day == 2 and calendar.isleap(2024)\n"
        "time.localtime(); time.perf_counter()"
    ),
    "hashes and encodings": (
        "import base64, hashlib, hmac, secrets, uuid, zlib\n"
        "assert hashlib.md5(b'').hexdigest()[:4] == 'd41d' and hashlib.sha3_256(b'').digest()\n"
        "secrets.token_hex(); uuid.uuid4(); uuid.uuid1(); assert zlib.crc32(b'a')\n"
        "assert base64.b64decode(base64.b64encode(b'x')) == b'x'"
    ),
    "random numbers and statistics": (
        "import cmath, math, random, statistics\nrandom.seed(1); random.shuffle([1, 2, 3])\n"
        "random.SystemRandom().random(); assert statistics.stdev([1, 3]) == math.sqrt(2)\n"
        "assert abs(cmath.exp(1j * math.pi) + 1) < 1e-9"
    ),
    "source code": (
        "import ast, contextlib, dis, doctest, inspect, io, traceback\n"
        "assert ast.literal_eval('[1]') == [1]; doctest.testmod()\n"
        "with contextlib.redirect_stdout(io.StringIO()) as out: print('x')\n"
        "assert out.getvalue() == 'x\\n'"
    ),
    "unit tests": (
        "import unittest\nclass T(unittest.TestCase):\n    def test(self): self.assertEqual(1, 1)\n"
        "found = unittest.defaultTestLoader.loadTestsFromTestCase(T)\n"
        "assert unittest.TextTestRunner().run(found).wasSuccessful()"
    ),
    "measurements": (
        "import cProfile, gc, platform, timeit, tracemalloc\ntimeit.timeit('1', number=9)\n"
        "cProfile.run('1'); tracemalloc.start(); platform.platform(); gc.collect()"
    ),
    "input and a terminal that are not there": (
        "import os, shutil, sys\nsys.stdout.isatty(); shutil.get_terminal_size()\n"
        "try: input(); assert False\nexcept EOFError: pass"
    ),
}  # fmt: skip

# Name -> the exception, the same behind every layer, and the program.
REFUSED = {
    "os.fork": ("OSError: [Errno 38]", "import os; os.fork()"),
    "multiprocessing.Process": (
        "OSError: [Errno 38]",
        "import multiprocessing; multiprocessing.Process(target=print).start()",
    ),
    # Its locks are files in shared memory. A system without these has no such locks.
    "multiprocessing.Pool": (
        ("PermissionError: [Errno 13]", "OSError: [Errno 30]"),
        "import multiprocessing; multiprocessing.Pool(2)",
    ),
    "subprocess of the same Python": (
        "OSError: [Errno 38]",
        "import subprocess, sys; subprocess.run([sys.executable, '-c', ''])",
    ),
    "a hard link": ("OSError: [Errno 38]", "import os; open('a', 'w'); os.link('a', 'b')"),
    "site-packages": ("ModuleNotFoundError: No module named 'numpy'", "import numpy"),
}
