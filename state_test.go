package connpool

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/textproto"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
	"github.com/seed-ecb488c9/connpool/internal/patience"
	"github.com/seed-ecb488c9/connpool/internal/synctest"
)

// Kinds of states, as protocols have them, and the writer in each.

type besideReader struct {
	*bufio.Reader
	w *bufio.Writer
}

type apart struct {
	in  *bufio.Reader
	out *bufio.Writer
}

type embedsBoth struct {
	*bufio.ReadWriter
}

type byValue struct {
	rw bufio.ReadWriter
}

type nestedState struct {
	wire struct{ codec apart }
}

type base struct{ apart }

type embedsPointer struct{ *base }

type throughInterfaces struct {
	in  io.Reader
	out io.Writer
	err error
	any any

	flushes interface{ Flush() error }
}

type wholeWriter struct{ w bufio.Writer }

type circle struct {
	next *circle
	apart
}

// halfTold has a Buffered of its own, which forgets the writer.
type halfTold struct{ apart }

func (s *halfTold) Buffered() int { return s.in.Buffered() }

// toldOfHidden hides its buffers, and counts both.
type toldOfHidden struct{ deep map[string]*apart }

func (s *toldOfHidden) Buffered() int { return s.deep["x"].in.Buffered() + s.deep["x"].out.Buffered() }

type overText struct {
	text *textproto.Writer
	in   *textproto.Reader
}

func newApart(nc net.Conn) apart { return apart{bufio.NewReader(nc), bufio.NewWriter(nc)} }

// codecs makes a state of each kind, with its two bufferPair; a half is nil if the
// state has none.
var codecs = map[string]func(nc net.Conn) (any, *bufio.Reader, *bufio.Writer){
	"*bufio.Writer": func(nc net.Conn) (any, *bufio.Reader, *bufio.Writer) {
		w := bufio.NewWriter(nc)
		return w, nil, w
	},
	"*bufio.ReadWriter": func(nc net.Conn) (any, *bufio.Reader, *bufio.Writer) {
		a := newApart(nc)
		return bufio.NewReadWriter(a.in, a.out), a.in, a.out
	},
	"a reader embedded, a writer beside it": func(nc net.Conn) (any, *bufio.Reader, *bufio.Writer) {
		a := newApart(nc)
		return besideReader{a.in, a.out}, a.in, a.out
	},
	"a pointer to such": func(nc net.Conn) (any, *bufio.Reader, *bufio.Writer) {
		a := newApart(nc)
		return &besideReader{a.in, a.out}, a.in, a.out
	},
	"two fields": func(nc net.Conn) (any, *bufio.Reader, *bufio.Writer) {
		a := newApart(nc)
		return a, a.in, a.out
	},
	"*bufio.ReadWriter embedded": func(nc net.Conn) (any, *bufio.Reader, *bufio.Writer) {
		a := newApart(nc)
		return &embedsBoth{ReadWriter: bufio.NewReadWriter(a.in, a.out)}, a.in, a.out
	},
	"bufio.ReadWriter by value": func(nc net.Conn) (any, *bufio.Reader, *bufio.Writer) {
		a := newApart(nc)
		return byValue{rw: bufio.ReadWriter{Reader: a.in, Writer: a.out}}, a.in, a.out
	},
	"bufio.Writer by value": func(nc net.Conn) (any, *bufio.Reader, *bufio.Writer) {
		s := new(wholeWriter)
		s.w.Reset(nc)
		return s, nil, &s.w
	},
	"structs inside structs": func(nc net.Conn) (any, *bufio.Reader, *bufio.Writer) {
		s := new(nestedState)
		s.wire.codec = newApart(nc)
		return s, s.wire.codec.in, s.wire.codec.out
	},
	"embedded by a pointer": func(nc net.Conn) (any, *bufio.Reader, *bufio.Writer) {
		s := embedsPointer{&base{newApart(nc)}}
		return s, s.in, s.out
	},
	"behind interfaces": func(nc net.Conn) (any, *bufio.Reader, *bufio.Writer) {
		a := newApart(nc)
		return &throughInterfaces{in: a.in, out: a.out}, a.in, a.out
	},
	"behind interfaces of other kinds": func(nc net.Conn) (any, *bufio.Reader, *bufio.Writer) {
		a := newApart(nc)
		return &throughInterfaces{any: a.in, flushes: a.out}, a.in, a.out
	},
	"both behind one interface": func(nc net.Conn) (any, *bufio.Reader, *bufio.Writer) {
		a := newApart(nc)
		return &throughInterfaces{in: bufio.NewReadWriter(a.in, a.out)}, a.in, a.out
	},
	"a ring": func(nc net.Conn) (any, *bufio.Reader, *bufio.Writer) {
		s := &circle{apart: newApart(nc)}
		s.next = s
		return s, s.in, s.out
	},
	"a Buffered that forgets the writer": func(nc net.Conn) (any, *bufio.Reader, *bufio.Writer) {
		s := &halfTold{newApart(nc)}
		return s, s.in, s.out
	},
	"hidden, with a Buffered that counts both": func(nc net.Conn) (any, *bufio.Reader, *bufio.Writer) {
		a := newApart(nc)
		return &toldOfHidden{map[string]*apart{"x": &a}}, a.in, a.out
	},
	"*textproto.Conn": func(nc net.Conn) (any, *bufio.Reader, *bufio.Writer) {
		c := textproto.NewConn(nc)
		return c, c.R, c.W
	},
	"fields of textproto's": func(nc net.Conn) (any, *bufio.Reader, *bufio.Writer) {
		a := newApart(nc)
		return overText{textproto.NewWriter(a.out), textproto.NewReader(a.in)}, a.in, a.out
	},
}

// bufferPair is what a test knows of a state.
type bufferPair struct {
	in  *bufio.Reader
	out *bufio.Writer
}

// TRY-03: what one borrower wrote and did not flush goes out in nobody else's loan,
// whatever the state is made of and however the loan came and ended.
func TestWhatWasNotFlushedNeverGoesOutInAnotherLoan(t *testing.T) {
	loans := map[string]func(n *testnet, fn func(Conn) error) error{
		"With": func(n *testnet, fn func(Conn) error) error { return n.p.With(bg, at("a"), fn) },
		"With, that says Keep": func(n *testnet, fn func(Conn) error) error {
			return n.p.With(bg, at("a"), func(c Conn) error { return Keep(cmpErr(fn(c))) })
		},
		"a lease": func(n *testnet, fn func(Conn) error) error {
			l := n.lease(at("a"))
			defer l.Return()
			return l.Do(bg, fn)
		},
		"a session": func(n *testnet, fn func(Conn) error) error {
			ctx, end := n.p.Session(bg)
			defer end()
			return n.p.With(ctx, at("a"), fn)
		},
		"a use inside a use": func(n *testnet, fn func(Conn) error) error {
			ctx, end := n.p.Session(bg)
			defer end()
			return n.p.With(ctx, at("a"), func(Conn) error { return n.p.With(ctx, at("a"), fn) })
		},
	}
	for kind, codec := range codecs {
		for how, loan := range loans {
			for _, push := range []bool{false, true} {
				if push && kind == "hidden, with a Buffered that counts both" {
					continue // with a Push it must count what was read alone, see Config.Setup
				}
				t.Run(fmt.Sprint(kind, ", ", how, ", Push ", push), func(t *testing.T) {
					bubble(t, func(t *testing.T) {
						n := newTestnet(t)
						n.Host("a").Serve(echoLines)
						made := make(map[string]bufferPair)
						var why error
						cfg := Config{
							Setup: func(_ context.Context, _ Addr, nc net.Conn) (any, error) {
								s, in, out := codec(nc)
								made[nc.LocalAddr().String()] = bufferPair{in, out}
								return s, nil
							},
							Reset: func(_ context.Context, c Conn) error { // too late, since what it flushes has an answer
								return made[who(c)].out.Flush()
							},
							Trace: &Trace{Closed: func(i CloseInfo) { why = i.Err }},
						}
						if push {
							cfg.Push = func(_ context.Context, c Conn) error {
								_, err := io.ReadFull(c, make([]byte, 1))
								return err
							}
						}
						n.open(cfg)
						err := loan(n, func(c Conn) error {
							_, err := io.WriteString(made[who(c)].out, "first, never flushed\n")
							return err
						})
						if how != "With, that says Keep" {
							require.NoError(t, err)
						}
						require.NoError(t, n.p.With(bg, at("a"), func(c Conn) error {
							h := made[who(c)]
							io.WriteString(h.out, "second\n")
							require.NoError(t, h.out.Flush())
							answer, err := bufio.NewReader(c).ReadString('\n')
							require.Equal(t, "2 second\n", answer)
							require.Equal(t, "a#2", who(c))
							return err
						}))
						synctest.Wait()
						n.closed(reasons{ClosedDirty: 1})
						if kind != "hidden, with a Buffered that counts both" {
							require.EqualError(t, why, "the borrower left 21 bytes unflushed in its state: flush them")
						}
						require.Equal(t, "a#2", n.use(at("a")), "what was flushed costs nothing")
						n.check()
					})
				})
			}
		}
	}
}

func cmpErr(err error) error {
	if err == nil {
		return errBoom
	}
	return err
}

// TRY-03, the other half: what a borrower left unread in a state of any kind.
func TestWhatAStateOfAnyKindHasUnreadIsReadByNobodyElse(t *testing.T) {
	for kind, codec := range codecs {
		t.Run(kind, func(t *testing.T) {
			bubble(t, func(t *testing.T) {
				n := newTestnet(t)
				n.Host("a").Serve(echoLines)
				var h bufferPair
				n.open(Config{Setup: func(_ context.Context, _ Addr, nc net.Conn) (any, error) {
					s, in, out := codec(nc)
					h = bufferPair{in, out}
					return s, nil
				}})
				if n.use(at("a")); h.in == nil {
					t.Skip("it reads by itself")
				}
				require.NoError(t, n.p.With(bg, at("a"), func(c Conn) error {
					io.WriteString(c, "one\ntwo\n")
					synctest.Wait()
					_, err := h.in.ReadString('\n')
					return err
				}))
				require.Equal(t, "a#2", n.use(at("a")))
				synctest.Wait()
				n.closed(reasons{ClosedDirty: 1})
			})
		})
	}
}

// A look at a state costs no memory, whatever the state is.
func TestTheLookIntoAStateAllocatesNothing(t *testing.T) {
	here, there := net.Pipe()
	defer here.Close()
	defer there.Close()
	for kind, codec := range codecs {
		s, _, _ := codec(here)
		c := &conn{state: s}
		c.held()
		require.Zero(t, patience.Allocs(100, func() { c.held() }), kind)
	}
}

// A state is looked at with care: nil pointers, its own and those in it.
func TestAStateWithNothingInItIsClean(t *testing.T) {
	for _, s := range []any{
		nil, 1, "x", (*bufio.Reader)(nil), (*bufio.Writer)(nil), (*bufio.ReadWriter)(nil), (*apart)(nil), apart{}, &apart{},
		&embedsBoth{}, embedsPointer{}, &throughInterfaces{in: (*bufio.Reader)(nil), err: errBoom, any: 7},
		&throughInterfaces{in: (*bufio.ReadWriter)(nil)}, &throughInterfaces{out: new(bufio.ReadWriter)}, overText{}, new(wholeWriter), wholeWriter{}, &circle{},
		map[string]*bufio.Writer{}, []byte("x"), func() {}, (*textproto.Conn)(nil), new(textproto.Conn),
	} {
		c := &conn{state: s}
		h := c.held()
		require.NoError(t, h.clean("nobody"), "%T", s)
	}
}

// TRY-03, ORA-26: a json.Decoder reads ahead, and what it has read is known; the space
// after a value is nothing.
func TestWhatAJSONDecoderHasReadAheadIsNotLeftToTheNextBorrower(t *testing.T) {
	type codec struct{ in *json.Decoder }
	type whole struct{ in json.Decoder }
	for name, make := range map[string]func(net.Conn) (any, *json.Decoder){
		"*json.Decoder": func(nc net.Conn) (any, *json.Decoder) { d := json.NewDecoder(nc); return d, d },
		"a field":       func(nc net.Conn) (any, *json.Decoder) { d := json.NewDecoder(nc); return codec{d}, d },
		"by value":      func(nc net.Conn) (any, *json.Decoder) { s := &whole{*json.NewDecoder(nc)}; return s, &s.in },
		"over a bufio.Reader": func(nc net.Conn) (any, *json.Decoder) {
			d := json.NewDecoder(bufio.NewReader(nc))
			return codec{d}, d
		},
	} {
		bubble(t, func(t *testing.T) {
			n := newTestnet(t)
			n.Host("a").Serve(func(c *faultnet.Conn) { io.Copy(c, c) })
			decoders := map[uint64]*json.Decoder{}
			var last *json.Decoder
			n.open(Config{Setup: func(_ context.Context, _ Addr, nc net.Conn) (s any, _ error) {
				s, last = make(nc)
				return s, nil
			}})
			ask := func(request string) (got string, id uint64) {
				require.NoError(t, n.p.With(bg, at("a"), func(c Conn) error {
					id = c.Info().ID
					if decoders[id] == nil {
						decoders[id] = last
					}
					if _, err := io.WriteString(c, request); err != nil {
						return err
					}
					return decoders[id].Decode(&got)
				}), name)
				return got, id
			}
			for i := range 3 {
				got, id := ask(fmt.Sprintf("\"%d\" \r\n", i))
				require.Equal(t, fmt.Sprint(i), got, name)
				require.EqualValues(t, 1, id, "%s: the space was taken for something", name)
			}
			ask("\"mine\"\n\"left\"\n")
			synctest.Wait()
			n.closed(reasons{ClosedDirty: 1})
			got, id := ask("\"next\"\n")
			require.Equal(t, "next", got, name)
			require.EqualValues(t, 2, id)
		})
	}
}
