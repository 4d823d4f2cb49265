package gateway

import (
	"bytes"
	"errors"
	"io"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/stretchr/testify/require"
)

// fuzzMax is -max-frame while fuzzing.
const fuzzMax = 4096

// cut is the result of a scanner for a stream: the ends of its frames, and whether the
// stream was out of step.
type cut struct {
	ends []int
	bad  bool
}

// cutInto feeds data to a scanner in pieces.
func cutInto(t *testing.T, sc scanner, data []byte, piece func(at int) int) (c cut) {
	t.Helper()
	for at, begin := 0, 0; at < len(data); {
		given := data[at:min(len(data), at+max(1, piece(at)))]
		n, done, err := sc.scan(given)
		if n > len(given) || n < 0 {
			t.Fatalf("it took %d of %d bytes", n, len(given))
		}
		if err != nil {
			c.bad = true
			return c
		}
		if !done && n != len(given) {
			t.Fatalf("it took %d of %d bytes and is not done", n, len(given))
		}
		if at += n; done {
			if at == begin {
				t.Fatal("an empty frame")
			}
			c.ends = append(c.ends, at)
			begin = at
		}
	}
	return c
}

// sameHoweverCut demands that a scanner finds the same frames in data whether it
// gets all of it at once, byte by byte, or in pieces that data itself decides.
func sameHoweverCut(t *testing.T, data []byte, fresh func() scanner) cut {
	t.Helper()
	whole := cutInto(t, fresh(), data, func(int) int { return len(data) })
	require.Equal(t, whole, cutInto(t, fresh(), data, func(int) int { return 1 }))
	require.Equal(t, whole, cutInto(t, fresh(), data, func(at int) int { return int(data[at]) % 13 }))
	return whole
}

// readAll takes the frames from a reader as the gateway does, and checks how much is
// stored meanwhile.
func readAll(t *testing.T, r io.Reader, sc scanner) (got [][]byte, err error) {
	t.Helper()
	b := &budget{limit: 4 * fuzzMax}
	f := frames{r: r, sc: sc, max: fuzzMax, store: store{budget: b}}
	for {
		frame, ok, err := f.take()
		if err != nil {
			return got, err
		}
		if ok {
			if len(frame) > fuzzMax {
				t.Fatalf("a frame of %d bytes", len(frame))
			}
			got = append(got, bytes.Clone(frame))
			continue
		}
		err = f.fill()
		if c := cap(f.store.b); c > 4*fuzzMax || b.held.Load() > b.limit {
			t.Fatalf("it holds %d bytes, %d counted", c, b.held.Load())
		}
		if err != nil {
			f.store.release()
			if b.held.Load() != 0 {
				t.Fatalf("%d bytes are held for nobody", b.held.Load())
			}
			return got, err
		}
	}
}

// sameFramesHoweverRead checks the same for the code around the scanner.
func sameFramesHoweverRead(t *testing.T, data []byte, fresh func() scanner) {
	t.Helper()
	whole, err1 := readAll(t, bytes.NewReader(data), fresh())
	bytewise, err2 := readAll(t, iotest.OneByteReader(bytes.NewReader(data)), fresh())
	require.Equal(t, whole, bytewise)
	require.Equal(t, err1 == io.EOF, err2 == io.EOF, "%v, %v", err1, err2)
	if e, ok := fresh().(ender); ok && len(data) > 0 && !bytes.HasSuffix(data, []byte(e.end())) {
		data = append(bytes.Clone(data), e.end()...) // the end of the stream ends the last frame
	}
	require.True(t, bytes.HasPrefix(data, bytes.Join(whole, nil)), "the frames are the stream, cut")

	// The server's side reads into a fixed buffer.
	u := &replies{sc: fresh(), max: fuzzMax}
	src := iotest.HalfReader(bytes.NewReader(data))
	var out store
	for i := 0; ; i++ {
		out.b = out.b[:0]
		if err := u.next(src, &out); err != nil {
			require.Len(t, whole, i, "%v", err)
			require.Empty(t, out.b, "nothing of a frame that failed is left")
			break
		}
		require.Equal(t, whole[i], out.b)
	}
}

func FuzzLine(f *testing.F) {
	for _, s := range []string{"", "\n", "a\nb\n", "half", "a\r\n\r\n", strings.Repeat("x", fuzzMax) + "\n"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		fresh := func() scanner { return lineScanner{} }
		got := sameHoweverCut(t, data, fresh)
		require.Len(t, got.ends, bytes.Count(data, []byte("\n")))
		sameFramesHoweverRead(t, data, fresh)
	})
}

func FuzzLength(f *testing.F) {
	f.Add(uint8(0), uint8(4), false, false, []byte("\x00\x00\x00\x03abc\x00\x00\x00\x00"))
	f.Add(uint8(3), uint8(2), true, true, []byte("idx\x07\x00hi"))
	f.Add(uint8(0), uint8(1), false, true, []byte("\x00"))
	f.Add(uint8(64), uint8(4), true, false, bytes.Repeat([]byte("\xff"), 200))
	f.Fuzz(func(t *testing.T, offset, size uint8, little, withHead bool, data []byte) {
		field := LengthField{Offset: int(offset), Size: int(size), Little: little, WithHead: withHead}
		if field.validate() != nil {
			return
		}
		fresh := func() scanner { return &lengthScanner{field: field, max: fuzzMax} }
		got := sameHoweverCut(t, data, fresh)
		begin := 0
		for _, end := range got.ends { // each frame has the length that its field gives
			total, err := field.total(data[begin:])
			require.NoError(t, err)
			require.EqualValues(t, end-begin, total)
			begin = end
		}
		sameFramesHoweverRead(t, data, fresh)
	})
}

// deadlineless is a connection that accepts deadlines and ignores them.
type deadlineless struct {
	io.Reader
	io.Writer
}

func (deadlineless) SetReadDeadline(time.Time) error  { return nil }
func (deadlineless) SetWriteDeadline(time.Time) error { return nil }

func FuzzModbus(f *testing.F) {
	f.Add(readRegisters(1, 2, 3, 4))
	f.Add(append(readRegisters(1, 2, 3, 4), 0, 5, 0, 0, 0, 3, 7, 0x83, 2))
	f.Add([]byte("GET / HTTP/1.1\r\n\r\n"))
	f.Fuzz(func(t *testing.T, data []byte) {
		sameHoweverCut(t, data, newMBAPScanner)
		sameFramesHoweverRead(t, data, newMBAPScanner)

		// Whatever a device answers, the client gets a frame with its own
		// transaction id, unit and function, or nothing.
		request := readRegisters(0xBEEF, 9, 0, 1)
		u := &replies{sc: newMBAPScanner(), max: fuzzMax, tid: 0x0102, matched: true}
		var out store
		answered := 0
		err := u.modbus(deadlineless{bytes.NewReader(data), io.Discard}, request, &out, &answered, time.Now().Add(forever), &Config{BroadcastWait: forever})
		require.Equal(t, readRegisters(0xBEEF, 9, 0, 1), request)
		require.Equal(t, err == nil, answered == 1)
		if err != nil {
			require.Empty(t, out.b)
			return
		}
		require.Equal(t, []byte{0xBE, 0xEF, 0, 0}, out.b[:4])
		require.Equal(t, byte(9), out.b[6])
		require.Equal(t, byte(3), out.b[7]&0x7f)
		require.Equal(t, []byte{1, 3}, data[:2], "it was the reply to this transaction")
	})
}

func FuzzRESP(f *testing.F) {
	for _, s := range []string{
		"*1\r\n$4\r\nPING\r\n", "PING\r\n", "*2\r\n$4\r\nECHO\r\n$0\r\n\r\n*0\r\n", "SET 'a b' \"\\x41\\n\"\n",
		"+OK\r\n-ERR x\r\n:1\r\n$-1\r\n*-1\r\n$3\r\nabc\r\n", "*2\r\n*1\r\n:1\r\n%1\r\n+a\r\n~2\r\n#t\r\n_\r\n",
		"|1\r\n+ttl\r\n:3\r\n$1\r\nx\r\n", ">3\r\n$7\r\nmessage\r\n$1\r\na\r\n$1\r\nb\r\n", "=5\r\ntxt:x\r\n!3\r\nERR\r\n(12\r\n,1.5\r\n",
		"$?\r\n;2\r\nab\r\n;0\r\n", "*?\r\n:1\r\n*?\r\n.\r\n.\r\n", "*0\r\n%0\r\n|0\r\n+x\r\n", strings.Repeat("*1\r\n", 200), "*99999999\r\n", "$99999999\r\n",
		">3\r\n$9\r\nsubscribe\r\n$1\r\na\r\n:1\r\n", "*3\r\n$11\r\nunsubscribe\r\n$-1\r\n:0\r\n", "*2\r\n$6\r\nCLIENT\r\n$7\r\nsetname\r\n",
	} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		requests := func() scanner { return &respRequests{max: fuzzMax} }
		replies := func() scanner { return &respReplies{max: fuzzMax} }
		got := sameHoweverCut(t, data, requests)
		sameFramesHoweverRead(t, data, requests)
		answers := sameHoweverCut(t, data, replies)
		sameFramesHoweverRead(t, data, replies)

		begin := 0
		for _, end := range got.ends {
			frame := data[begin:end]
			begin = end
			if frame[0] != '*' {
				args, err := splitInline(frame)
				if err != nil {
					var bad *malformed
					require.True(t, errors.As(err, &bad))
					continue
				}
				frame = appendCommand(nil, args...)
			}
			// The bytes sent to the server are what was understood: encoded again, the
			// result is the same bytes.
			var all [][]byte
			args := argsOf(frame)
			for {
				a, ok := args.next()
				if !ok {
					break
				}
				all = append(all, a)
			}
			if len(all) > 0 {
				require.Empty(t, args.rest, "%q", frame)
				require.Equal(t, string(frame), string(appendCommand(nil, all...)))
			} else {
				require.Equal(t, nothing, classify(frame).class)
			}
			m := classify(frame)
			if m.class == identifies {
				claimed, answer := identity{}.claim(m.verb, words(frame))
				require.True(t, answer == "" || answer[0] == '-')
				require.LessOrEqual(t, len(claimed.scope()), 1024)
			}
		}
		begin = 0
		for _, end := range answers.ends {
			subscription(data[begin:end])
			isMessage(data[begin:end])
			begin = end
		}
	})
}
