package connpool

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool/internal/faultnet"
)

// secretive has a field that its text does not show.
type secretive struct{ Op, Password string }

func (s *secretive) Error() string { return s.Op + " refused" }

// TRY-23: whatever a dial failed with, statistics and errors marshal to one small
// line with its text, and with nothing of what is inside.
func TestErrorsMarshalAsTheirText(t *testing.T) {
	srv, err := faultnet.Start(faultnet.Options{Network: "tls"})
	require.NoError(t, err)
	defer srv.Close()
	long := strings.Repeat("<ä\x00\n>", 10_000)
	for name, c := range map[string]struct {
		cfg      Config
		contains string
	}{
		"a certificate":      {Config{TLS: &tls.Config{RootCAs: faultnet.NewCA().Pool()}}, "certificate signed by unknown authority"},
		"a func":             {Config{TLS: srv.ClientTLS(), Setup: func(context.Context, Addr, net.Conn) (any, error) { panic(func() {}) }}, "a value of type func()"},
		"a channel in a map": {Config{TLS: srv.ClientTLS(), Setup: func(context.Context, Addr, net.Conn) (any, error) { panic(map[any]any{1: make(chan int)}) }}, "panicked"},
		"a secret panic":     {Config{TLS: srv.ClientTLS(), Setup: func(context.Context, Addr, net.Conn) (any, error) { panic(secretive{"login", "hunter2"}) }}, "secretive"},
		"a secret":           {Config{TLS: srv.ClientTLS(), Setup: func(context.Context, Addr, net.Conn) (any, error) { return nil, &secretive{"login", "hunter2"} }}, "login refused"},
		"no fields":          {Config{TLS: srv.ClientTLS(), Setup: func(context.Context, Addr, net.Conn) (any, error) { return nil, errBoom }}, "boom"},
		"a long text":        {Config{TLS: srv.ClientTLS(), Setup: func(context.Context, Addr, net.Conn) (any, error) { return nil, errors.New(long) }}, "ä"},
	} {
		t.Run(name, func(t *testing.T) {
			p, err := New(c.cfg)
			require.NoError(t, err)
			defer p.Close()
			a := Addr{Transport: TLS, Host: srv.Host(), Port: srv.Port()}
			failed := p.With(bg, a, nil2)
			require.Error(t, failed)
			line := func(v any) string {
				b, err := json.Marshal(v)
				require.NoError(t, err)
				require.Less(t, len(b), 8000)
				if name != "a long text" { // whose signs take six bytes each
					require.Less(t, len(b), 1500)
				}
				require.NotContains(t, string(b), "\n")
				require.NotContains(t, string(b), "hunter2")
				require.NotContains(t, string(b), "Raw")
				require.True(t, json.Valid(b))
				return string(b)
			}
			var pe *Error
			require.ErrorAs(t, failed, &pe)
			for _, v := range []any{pe, failed, struct{ Err error }{failed}} {
				require.Contains(t, line(v), c.contains)
			}
			var pan *PanicError
			if errors.As(failed, &pan) {
				require.Contains(t, line(pan), c.contains)
			}
			line(p.Stats())
			addrs := 0
			for a, st := range p.Addrs() {
				addrs++
				require.Contains(t, line(st), c.contains)
				// As connpool size wants its history.
				text := line(struct {
					Time time.Time
					Addr string
					AddrStats
				}{time.Now(), a.String(), st})
				var back map[string]any
				require.NoError(t, json.Unmarshal([]byte(text), &back))
				require.Equal(t, a.String(), back["Addr"])
				require.Contains(t, back["LastErr"], c.contains)
				require.EqualValues(t, 1, back["Dials"])
				require.ErrorIs(t, st.LastErr, errors.Unwrap(pe), "the error itself is there, too")
			}
			require.Equal(t, 1, addrs)
		})
	}
	e := &Error{Stage: StageWait, Kind: KindTimeout, Waited: time.Second, Limit: 2, LimitName: "MaxOpen", Err: context.DeadlineExceeded}
	b, err := json.Marshal(e)
	require.NoError(t, err)
	require.JSONEq(t, `{"Error":"connpool: wait: context deadline exceeded (0 of 2 in use, 0 waiting; raise MaxOpen, borrow for a shorter time, or give ctx longer), after 1s",
		"Stage":"wait","Kind":"timeout","Waited":1000000000,"Open":0,"InUse":0,"Idle":0,"Waiting":0,"Limit":2,"LimitName":"MaxOpen","Err":"context deadline exceeded"}`, string(b))
	var log strings.Builder
	slog.New(slog.NewJSONHandler(&log, nil)).Error("x", "err", e)
	require.Contains(t, log.String(), `"err":"connpool: wait: `, "in a log it is its text")
}
