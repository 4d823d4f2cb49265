package main

import (
	"bufio"
	"bytes"
	"net"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/examples/internal/loopback"
)

func TestExampleRuns(t *testing.T) {
	var out strings.Builder
	require.NoError(t, run(&out, nil))
	require.Equal(t, "alice: [alice@example.org], <nil>\nnobody: [], <nil>\nbob: [bob@example.org], <nil>\nbinds: 1\n", out.String())
	require.Error(t, run(&out, []string{"nowhere"}))
}

func directoryOn(t *testing.T, serve func(net.Conn), password string) (*directory, *loopback.Server) {
	t.Helper()
	s, err := loopback.Start(serve)
	require.NoError(t, err)
	t.Cleanup(s.Close)
	d, err := newDirectory(func(string) string { return password })
	require.NoError(t, err)
	t.Cleanup(func() { d.pool.Close() })
	return d, s
}

func TestIdentitiesNeverShareABind(t *testing.T) {
	d, s := directoryOn(t, serveDirectory, "secret")
	a, b := s.Addr(), s.Addr()
	a.Scope, b.Scope = "cn=a", "cn=b"
	var all sync.WaitGroup
	for range 8 {
		all.Go(func() {
			for range 20 {
				for _, addr := range []connpool.Addr{a, b} {
					if mails, err := d.mail(t.Context(), addr, "alice"); err != nil || len(mails) != 1 {
						t.Errorf("%v, %v", mails, err)
					}
				}
			}
		})
	}
	all.Wait()
	require.LessOrEqual(t, d.pool.Stats().PeakOpen, 8)
	require.Less(t, s.Accepted(), 40, "of 320 searches")
	require.GreaterOrEqual(t, s.Accepted(), 2)
}

func TestRefusedBindFailsTheBorrowAndLeavesNothing(t *testing.T) {
	for password, says := range map[string]string{"wrong": "wrong name or password", "": "no password for"} {
		d, s := directoryOn(t, serveDirectory, password)
		addr := s.Addr()
		addr.Scope = "cn=app"
		_, err := d.mail(t.Context(), addr, "alice")
		require.ErrorContains(t, err, says)
		var pe *connpool.Error
		require.ErrorAs(t, err, &pe)
		require.Equal(t, connpool.StageSetup, pe.Stage)
		require.Eventually(t, func() bool { return d.pool.Stats().Open == 0 }, time.Minute, time.Millisecond)
	}
}

func TestNoSuchObjectCostsNoConnection(t *testing.T) {
	d, s := directoryOn(t, serveDirectory, "secret")
	for range 3 {
		var r *result
		require.ErrorAs(t, d.pool.With(t.Context(), s.Addr(), func(c connpool.Conn) error {
			_, err := connpool.State[*codec](c).search("ou=elsewhere", "uid", "alice", "mail")
			return err
		}), &r)
		require.Equal(t, noSuchObject, r.code)
	}
	require.Equal(t, 1, s.Accepted())
}

// The directory sends an unrequested notice of disconnection right after an answer. The
// next search must neither fail because of the notice nor take it for its answer.
func TestNoticeOfDisconnectionIsNobodysAnswer(t *testing.T) {
	notice := element(tagSequence, number(tagInteger, 0), element(0x78, number(tagEnum, 52), octets(""), octets("shutting down")))
	d, s := directoryOn(t, func(nc net.Conn) {
		serveDirectory(&talkative{Conn: nc, after: 2, what: notice}) // bind, search
	}, "secret")
	for range 3 {
		mails, err := d.mail(t.Context(), s.Addr(), "bob")
		require.NoError(t, err)
		require.Equal(t, []string{"bob@example.org"}, mails)
	}
	require.Equal(t, 3, s.Accepted())
	require.Zero(t, d.pool.Stats().Idle)
}

// A notice before the answer fails the search that waits for the answer.
func TestNoticeBeforeTheAnswerFailsTheSearch(t *testing.T) {
	notice := element(tagSequence, number(tagInteger, 0), element(0x78, number(tagEnum, 52), octets(""), octets("shutting down")))
	d, s := directoryOn(t, func(nc net.Conn) {
		serveDirectory(&talkative{Conn: nc, after: 2, what: notice, first: true})
	}, "secret")
	_, err := d.mail(t.Context(), s.Addr(), "bob")
	require.ErrorContains(t, err, "disconnects")
	require.Eventually(t, func() bool { return d.pool.Stats().Open == 0 }, time.Minute, time.Millisecond)
}

// talkative adds bytes to one of its writes.
type talkative struct {
	net.Conn
	after int
	what  []byte
	first bool
}

func (t *talkative) Write(b []byte) (int, error) {
	if t.after--; t.after == 0 {
		if b = append(b[:len(b):len(b)], t.what...); t.first {
			b = append(t.what[:len(t.what):len(t.what)], b[:len(b)-len(t.what)]...)
		}
	}
	return t.Conn.Write(b)
}

// TRY-34: also where an int has 32 bits.
func TestALengthBeyondTheBoundIsRefusedOnEverySystem(t *testing.T) {
	for _, length := range []string{"\x84\xff\xff\xff\xff", "\x84\x80\x00\x00\x00", "\x84\x7f\xff\xff\xff", "\x83\xff\xff\xff"} {
		_, _, err := readElement(bufio.NewReader(strings.NewReader("\x30" + length + "abc")))
		require.ErrorIs(t, err, errBER)
		p := &parser{rest: []byte("\x04" + length + "abc")}
		p.any()
		require.ErrorIs(t, p.err, errBER)
	}
}

func FuzzParser(f *testing.F) {
	f.Add(element(tagSequence, number(tagInteger, 1), element(tagDone, number(tagEnum, 0), octets(""), octets("x"))))
	f.Add([]byte{tagSequence, 0x84, 0xff, 0xff, 0xff, 0xff})
	f.Fuzz(func(t *testing.T, b []byte) {
		c := &codec{Reader: bufio.NewReader(bytes.NewReader(b)), id: 1}
		for {
			_, p, err := c.receive()
			if err != nil {
				return
			}
			outcome(p)
		}
	})
}

func TestElementsOfEveryLengthComeBack(t *testing.T) {
	for _, n := range []int{0, 1, 0x7f, 0x80, 0xff, 0x100, 0xffff, 0x10000} {
		tag, contents, err := readElement(bufio.NewReader(bytes.NewReader(octets(strings.Repeat("x", n)))))
		require.NoError(t, err)
		require.EqualValues(t, tagOctets, tag)
		require.Len(t, contents, n)
		p := &parser{rest: number(tagInteger, n)}
		require.Equal(t, n, p.number(tagInteger))
		require.NoError(t, p.err)
	}
}
