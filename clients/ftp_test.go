//go:build unix

package clients

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/textproto"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jlaffaye/ftp"
	"github.com/stretchr/testify/require"

	"github.com/seed-ecb488c9/connpool"
	"github.com/seed-ecb488c9/connpool/internal/realserver"
)

// ftpClient is a ServerConn of jlaffaye/ftp, made for Carry:
//
//	k, err := dialFTP(ctx, addr)
//	if err != nil {
//		return nil, err
//	}
//	return connpool.Carry(k, k.alive, k.control), nil
//
// It knows the connections of its transfers, too: a transfer that a borrower has left open has a
// reply that nobody has read, and a transfer that is under way ends with the client.
type ftpClient struct {
	*ftp.ServerConn
	control   net.Conn
	ctx       context.Context // ends with Close
	end       context.CancelFunc
	transfers atomic.Int32 // connections of transfers that are open
}

func dialFTP(ctx context.Context, addr connpool.Addr) (*ftpClient, error) {
	k := new(ftpClient)
	k.ctx, k.end = context.WithCancel(context.Background())
	address := net.JoinHostPort(addr.Host, strconv.Itoa(int(addr.Port)))
	var err error
	if k.control, err = new(net.Dialer).DialContext(ctx, "tcp", address); err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { k.control.Close() }) // the greeting and the log-in know no ctx
	k.ServerConn, err = ftp.Dial(address, ftp.DialWithDialFunc(func(network, to string) (net.Conn, error) {
		if k.ServerConn == nil {
			return k.control, nil
		}
		return k.dialTransfer(network, to)
	}))
	if err == nil {
		err = k.Login("anonymous", "anonymous")
	}
	if !stop() {
		err = ctx.Err()
	}
	if err != nil {
		k.control.Close()
		return nil, err
	}
	return k, nil
}

func (k *ftpClient) dialTransfer(network, address string) (net.Conn, error) {
	nc, err := new(net.Dialer).DialContext(k.ctx, network, address)
	if err != nil {
		return nil, err
	}
	k.transfers.Add(1)
	return &transfer{Conn: nc, client: k, stop: context.AfterFunc(k.ctx, func() { nc.Close() })}, nil
}

// transfer is the connection of a transfer.
type transfer struct {
	net.Conn
	client *ftpClient
	stop   func() bool
	closed atomic.Bool
}

func (d *transfer) Close() error {
	if d.closed.Swap(true) {
		return net.ErrClosed
	}
	d.stop()
	d.client.transfers.Add(-1)
	return d.Conn.Close()
}

// alive does not ask the server: NoOp waits for a reply, and would cost each loan a round trip.
// The end of the connection is heard through the socket that Carry got. So alive says only what
// the last borrower left behind.
func (k *ftpClient) alive() error {
	if k.transfers.Load() > 0 {
		return errors.New("a transfer was not closed: the server's word on it is unread")
	}
	return nil
}

// Close sends QUIT, which waits for no reply. A ServerConn is not safe for concurrent use. So if
// the pool has closed the control connection, because an exchange was broken off, Close leaves
// the ServerConn to the borrower who may still be in it.
func (k *ftpClient) Close() error {
	k.end()
	if err := k.control.SetDeadline(time.Now().Add(time.Second)); err != nil {
		return err // the control connection is closed
	}
	return k.Quit()
}

func (k *ftpClient) socket() net.Conn { return k.control }

// textOf is what is in the file of this number.
func textOf(n int) []byte { return bytes.Repeat(fmt.Appendf(nil, "%d\n", n), 500) }

// fetch gets a file whole.
func (k *ftpClient) fetch(name string) ([]byte, error) {
	in, err := k.Retr(name)
	if err != nil {
		return nil, err
	}
	text, err := io.ReadAll(in)
	return text, errors.Join(err, in.Close())
}

var fileServer = library{
	kind: realserver.VSFTPD(),
	prepare: func(t *testing.T, srv *realserver.Server) {
		for n := range 20 {
			require.NoError(t, os.WriteFile(filepath.Join(srv.Dir, "files", strconv.Itoa(n)), textOf(n), 0o644))
		}
		large := filepath.Join(srv.Dir, "files", "large")
		require.NoError(t, os.WriteFile(large, nil, 0o644))
		require.NoError(t, os.Truncate(large, 1<<40)) // nobody gets it whole
	},
	dial: func(ctx context.Context, addr connpool.Addr) (carriedClient, error) {
		return orNil(dialFTP(ctx, addr))
	},
	exchange: func(k carriedClient, n int) error {
		text, err := k.(*ftpClient).fetch(strconv.Itoa(n % 20))
		if err == nil && !bytes.Equal(text, textOf(n%20)) {
			err = fmt.Errorf("asked for file %d, got %.20q", n%20, text)
		}
		return err
	},
	refused: func(k carriedClient) error {
		var no *textproto.Error
		_, err := k.(*ftpClient).fetch("none")
		if !errors.As(err, &no) || no.Code != ftp.StatusFileUnavailable {
			return fmt.Errorf("the server says no, not %w", err)
		}
		return connpool.Keep(err)
	},
	endless: func(k carriedClient, begun func()) error {
		in, err := k.(*ftpClient).Retr("large")
		if err != nil {
			return err
		}
		begun()
		_, err = io.Copy(io.Discard, in)
		return errors.Join(err, in.Close())
	},
	abandon: []func(k carriedClient) error{
		func(k carriedClient) error {
			_, err := k.(*ftpClient).Retr("1")
			return err // the transfer is not closed
		},
		func(k carriedClient) error {
			in, err := k.(*ftpClient).Retr("large")
			if err == nil {
				_, err = io.ReadFull(in, make([]byte, 1000))
			}
			return err
		},
	},
	goodbyes: func(t *testing.T, srv *realserver.Server) int {
		return strings.Count(logOf(t, srv, "vsftpd.log"), `FTP command: Client "127.0.0.1", "QUIT"`)
	},
}

// ADO-02: an FTP client dials for itself, and dials again for each transfer. The pool lends the
// client and knows its control connection.
func TestAnFTPClientIsCarried(t *testing.T) { fileServer.test(t) }

// ADO-02: a dial that is in the client's hands ends with its ctx, though the client knows none
// while it waits for the greeting.
func TestAnFTPServerThatDoesNotGreetHoldsNoDial(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(t, err)
	defer l.Close()
	p, addr, _ := fileServer.pool(t, &realserver.Server{Addr: l.Addr().String()}, func(c *connpool.Config) { c.DialTimeout = 50 * time.Millisecond })
	err = p.With(t.Context(), addr, func(connpool.Conn) error { return errors.New("lent") })
	require.Equal(t, connpool.KindTimeout, connpool.KindOf(err), "%v", err)
	require.Zero(t, p.Stats().AbandonedCalls)
}
