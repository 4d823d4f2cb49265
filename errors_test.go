package connpool

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
)

type timeoutOnly struct{}

func (timeoutOnly) Error() string { return "slow" }
func (timeoutOnly) Timeout() bool { return true }

// BETA-X05
func TestKindOfEveryKind(t *testing.T) {
	op := func(err error) error { return &net.OpError{Op: "dial", Net: "tcp", Err: err} }
	sys := func(errno syscall.Errno) error { return op(os.NewSyscallError("connect", errno)) }
	canceled, cancel := context.WithCancelCause(bg)
	cancel(io.EOF)
	cases := map[Kind][]error{
		KindUnknown: {nil, errBoom, fmt.Errorf("x: %w", errBoom)},
		KindAccess:  {sys(syscall.EACCES), sys(syscall.EPERM), fs.ErrPermission},
		KindAddress: {sys(syscall.ENETUNREACH), sys(syscall.EHOSTUNREACH), sys(syscall.EAFNOSUPPORT),
			op(&net.AddrError{Err: "missing port", Addr: "x"})},
		KindBadMessage: {errors.New("tls: received unexpected handshake message"), tls.RecordHeaderError{Msg: "first record does not look like a TLS handshake"}, op(tls.AlertError(40)),
			&tls.CertificateVerificationError{Err: x509.HostnameError{Certificate: &x509.Certificate{}, Host: "x"}}},
		KindBroken: {sys(syscall.ECONNRESET), sys(syscall.EPIPE), sys(syscall.ECONNABORTED), io.ErrClosedPipe, io.ErrShortWrite},
		KindEOF:    {io.EOF, io.ErrUnexpectedEOF, op(io.EOF)},
		KindLookup: {&net.DNSError{Err: "no such host", Name: "x", IsNotFound: true}, op(&net.DNSError{Err: "server misbehaving"})},
		KindInternal: {&PanicError{Where: "Config.Setup", Value: 1}, &PanicError{Where: "Config.Setup"},
			&PanicError{Where: "Config.Setup", Value: io.EOF}, &brokenContract{"x"}, fmt.Errorf("x: %w", &brokenContract{"y"})},
		KindCanceled: {context.Canceled, causeOf(canceled), &ioError{kind: KindCanceled, err: os.ErrDeadlineExceeded}},
		KindRefused:  {sys(syscall.ECONNREFUSED), sys(syscall.ENOENT), fs.ErrNotExist},
		KindResource: {sys(syscall.EMFILE), sys(syscall.ENFILE), sys(syscall.EADDRNOTAVAIL), sys(syscall.ENOMEM), sys(syscall.ENOBUFS),
			ErrExhausted, ErrNoneRemovable, errors.Join(ErrNoneRemovable, sys(syscall.EMFILE))},
		KindTimeout: {context.DeadlineExceeded, os.ErrDeadlineExceeded, op(os.ErrDeadlineExceeded), sys(syscall.ETIMEDOUT), timeoutOnly{},
			&net.DNSError{Err: "slow", IsTimeout: true}, &ioError{kind: KindTimeout, err: os.ErrDeadlineExceeded}},
		KindTimeoutInTransfer: {&ioError{kind: KindTimeoutInTransfer, cause: context.DeadlineExceeded, err: os.ErrDeadlineExceeded}},
		KindUsage:             {ErrReturned, ErrClosed, net.ErrClosed, op(net.ErrClosed), fs.ErrInvalid, Addr{}.Validate()},
	}
	for k := range kindNames {
		kind := Kind(k)
		require.NotEmpty(t, cases[kind], "no case for %s", kind)
		for _, err := range cases[kind] {
			require.Equal(t, kind.String(), KindOf(err).String(), "%v", err)
			if err != nil {
				require.Equal(t, kind.String(), KindOf(fmt.Errorf("wrapped: %w", err)).String())
				require.Equal(t, kind.String(), KindOf(Keep(err)).String())
			}
		}
		text, err := kind.MarshalText()
		require.NoError(t, err)
		require.Equal(t, kind.String(), string(text))
		// An *Error has made up its mind already.
		require.Equal(t, kind, KindOf(fmt.Errorf("x: %w", &Error{Kind: kind, Err: io.EOF})))
	}
	require.Equal(t, "connpool.Kind(99)", Kind(99).String())
}

// BETA-X08: what is in the loan itself.
func TestTimeOutsInAndBeforeATransferDiffer(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{})
		read := func(c Conn) error {
			c.SetReadDeadline(time.Now().Add(time.Second))
			_, err := c.Read(make([]byte, 1))
			return err
		}
		err := n.p.With(bg, at("a"), read)
		require.Equal(t, KindTimeout, KindOf(err))
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
		err = n.p.With(bg, at("a"), func(c Conn) error {
			io.WriteString(c, "half a request")
			return read(c)
		})
		require.Equal(t, KindTimeoutInTransfer, KindOf(err))
		ctx, cancel := context.WithTimeout(bg, time.Second)
		defer cancel()
		err = n.p.With(ctx, at("a"), func(c Conn) error { _, err := c.Read(make([]byte, 1)); return err })
		require.Equal(t, KindTimeout, KindOf(err))
		require.ErrorIs(t, err, context.DeadlineExceeded)
		require.ErrorIs(t, err, os.ErrDeadlineExceeded)
		var ne net.Error
		require.ErrorAs(t, err, &ne)
		require.True(t, ne.Timeout())
	})
}

func TestAnErrorSaysWhatToChange(t *testing.T) {
	addr := Addr{Transport: TLS, Host: "db.example", Port: 5432}
	for want, e := range map[string]*Error{
		"connpool: usage: ctx is nil": {Stage: StageUsage, Err: errors.New("ctx is nil")},
		"connpool: wait tls://db.example:5432: context deadline exceeded (4 of 4 in use, 7 waiting; raise MaxPerAddr," +
			" borrow for a shorter time, or give ctx longer), after 2s": {Addr: addr, Stage: StageWait, Kind: KindTimeout, Waited: 2 * time.Second,
			InUse: 4, Waiting: 7, Limit: 4, LimitName: "MaxPerAddr", Err: context.DeadlineExceeded},
		"connpool: wait tls://db.example:5432: limit reached (3 of 3 waiting; raise MaxWaiters," +
			" borrow for a shorter time, or let borrowers wait: WhenFull, MaxWaiters)": {Addr: addr, Stage: StageWait, Waiting: 3, Limit: 3, LimitName: "MaxWaiters", Err: ErrExhausted},
		"connpool: dial tls://db.example:5432: connection refused, after 1.235ms": {Addr: addr, Stage: StageDial,
			Waited: 1234567 * time.Nanosecond, Err: syscall.ECONNREFUSED},
		"connpool: back-off tls://db.example:5432: boom":  {Addr: addr, Stage: StageBackoff, Err: errBoom},
		"connpool: handshake tls://db.example:5432: boom": {Addr: addr, Stage: StageHandshake, Err: errBoom},
		"connpool: setup tls://db.example:5432: boom":     {Addr: addr, Stage: StageSetup, Err: errBoom},
		"connpool: wait: pool is closed":                  {Stage: StageWait, Err: ErrClosed},
	} {
		require.Equal(t, want, e.Error())
		require.True(t, errors.Unwrap(e) == e.Err)
	}
	require.True(t, (&Error{Kind: KindTimeout}).Timeout())
	require.False(t, (&Error{Kind: KindCanceled}).Timeout())
	require.Equal(t, "connpool.Stage(0) connpool.Stage(99)", fmt.Sprint(Stage(0), Stage(99)))
}

// An *Error of the wild names the limit that was in the way, of both kinds.
func TestTheLimitInTheWayIsNamed(t *testing.T) {
	bubble(t, func(t *testing.T) {
		n := open(t, Config{MaxOpen: 3, MaxPerAddr: 2})
		for _, host := range []string{"a", "a", "b"} {
			n.borrow(bg, at(host)).conn()
		}
		ctx, cancel := context.WithTimeout(bg, time.Second)
		defer cancel()
		pe := n.fail(ctx, at("a"))
		require.Equal(t, "2 of 2 MaxPerAddr", fmt.Sprint(pe.InUse, " of ", pe.Limit, " ", pe.LimitName))
		ctx, cancel = context.WithTimeout(bg, time.Second)
		defer cancel()
		pe = n.fail(ctx, at("c"))
		require.Equal(t, "3 of 3 MaxOpen", fmt.Sprint(pe.InUse, " of ", pe.Limit, " ", pe.LimitName))
	})
	bubble(t, func(t *testing.T) { // a slow dial is no limit
		n := open(t, Config{MaxPerAddr: 2})
		n.Host("a").BlackHole(true)
		ctx, cancel := context.WithTimeout(bg, time.Second)
		defer cancel()
		pe := n.fail(ctx, at("a"))
		require.Zero(t, pe.Limit)
		require.Empty(t, pe.LimitName)
		require.Equal(t, "connpool: wait mem://a: context deadline exceeded; a dial has been under way for 1s (dial), after 1s", pe.Error())
	})
}

func TestKeepWrapsAndUnkeepUnwraps(t *testing.T) {
	require.NoError(t, Keep(nil))
	require.NoError(t, unkeep(nil))
	kept := Keep(errBoom)
	require.ErrorIs(t, kept, errBoom)
	require.Equal(t, "boom", kept.Error())
	require.True(t, unkeep(kept) == errBoom)
	require.True(t, unkeep(errBoom) == errBoom)
	deep := fmt.Errorf("deep: %w", kept)
	require.ErrorIs(t, unkeep(deep), deep)
	require.True(t, isKept(deep))
	require.False(t, isKept(unkeep(deep)), "a mark has its say once")
	require.True(t, unkeep(Keep(kept)) == errBoom)
}

func TestAPanicErrorUnwrapsToItsError(t *testing.T) {
	require.ErrorIs(t, &PanicError{Where: "x", Value: errBoom}, errBoom)
	require.Equal(t, "Config.Setup panicked: 7", (&PanicError{Where: "Config.Setup", Value: 7}).Error())
	require.NoError(t, errors.Unwrap(&PanicError{Where: "x", Value: 7}))
	require.Contains(t, (&PanicError{Where: "x"}).Error(), "Goexit")
}
